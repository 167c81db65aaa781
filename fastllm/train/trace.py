"""What a torch.profiler trace says of the training steps in it: which kind of work their time went to, and how many FLOPs their
matrix products had by the shapes that were recorded.

The trace is read from its file, the Chrome format that TensorBoard and Perfetto open, so that one of another machine will do.
"""

from __future__ import annotations

import bisect
import gzip
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastllm.train.throughput import visible_pairs

KINDS = ("matmul", "attention", "element-wise", "optimizer", "communication", "data wait", "idle")
STEP, DATA = "fastllm.step", "fastllm.data"  # the ranges that mark a step's work and the wait for its batch ahead of it

Span = tuple[float, float]  # microseconds


@dataclass(frozen=True)
class Operation:
    """All calls of one operation within the steps: its own seconds, without those of the operations it is made of."""

    name: str
    kind: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """The steps of a trace. `shares` are of their wall time, by KINDS, and add up to 1: every moment has one kind.

    Where work of several kinds overlaps, on streams of a GPU say, the moment is the kind's that comes first in KINDS; so
    communication is what computation does not hide, and `communication_s` has all of it.
    """

    steps: int
    seconds: float
    device: str  # whose time it is: "cpu", or "gpu" where the trace has kernels of one
    shares: dict[str, float]
    communication_s: float
    matmul_flops: float
    attention_flops: float
    operations: list[Operation]  # by their own time, the longest first
    uncounted: list[str] = field(
        default_factory=list
    )  # matrix products and attention whose FLOPs their shapes do not tell

    @property
    def tflops(self) -> float:
        """The third view of utilisation: TFLOPS of the matrix products that ran, of this process."""
        return (self.matmul_flops + self.attention_flops) / self.seconds / 1e12


def read(path: str | os.PathLike[str], documents: Sequence[Sequence[int]] = (), steps: int | None = None) -> Profile:
    """The profile of a trace that has steps marked by STEP and DATA.

    FLOPs are a multiplication and an addition for each weight and token, padding included, and attention's over the pairs of
    tokens that its arguments leave visible, half of the square where it is causal or has a mask over all tokens. A backward pass
    counts twice its forward pass, whatever a kernel repeats in it; what activation checkpointing repeats counts, as it does in
    `hardware_tflops`.

    Args:
        path: of a .json or .json.gz.
        documents: for each packed batch in the steps the lengths of its rows, which shapes do not tell.
        steps: the first so many alone, because the last was broken off; None: all.

    Raises:
        ValueError: no trace, or one without a whole step.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        trace = json.load(file)
    found = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{path} is no trace of torch.profiler")
    events = [_Event(e) for e in found if e.get("ph") == "X" and e.get("cat") in _HOST | _DEVICE]
    windows, waits = _steps(events, steps)
    if not windows:
        raise ValueError(f"{path} has no whole training step in it")
    own = list(_own_time([e for e in events if e.category in _HOST]))
    kernels = [e for e in events if e.category in _DEVICE]
    if kernels:
        _by_launcher(kernels, events)
        own = [(e, e.begin, e.end) for e in kernels]
    own = [(e, *clipped) for e, begin, end in own if e.kind for clipped in _within((begin, end), windows)]

    spans: dict[str, list[Span]] = defaultdict(list)
    for event, begin, end in own:
        spans[event.kind or ""].append((begin, end))
    # On a CPU what a batch is made of is the wait for it; a GPU may still be at work meanwhile.
    spans["data wait"] = waits
    order = list(KINDS[:-1])
    if not kernels:
        order.insert(0, order.pop(order.index("data wait")))
    seconds = _partition(spans, order, windows)
    whole = _length(windows)
    flops, uncounted = _flops([e for e in events if e.category == "cpu_op"], windows, waits, documents)
    return Profile(
        steps=len(windows),
        seconds=whole / 1e6,
        device="gpu" if kernels else "cpu",
        shares={kind: seconds[kind] / whole for kind in KINDS},
        communication_s=_length(_merged(spans["communication"])) / 1e6,
        matmul_flops=flops["matmul"],
        attention_flops=flops["attention"],
        operations=_operations(own),
        uncounted=uncounted,
    )


_HOST = frozenset({"cpu_op", "user_annotation"})
_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})


class _Event:
    __slots__ = ("above", "arguments", "begin", "category", "counted", "end", "kind", "lane", "name")

    def __init__(self, event: dict[str, Any]) -> None:
        self.name: str = event["name"]
        self.category: str = event["cat"]
        self.begin = float(event["ts"])
        self.end = self.begin + float(event.get("dur", 0))
        self.arguments: dict[str, Any] = event.get("args") or {}
        # Work of a collective library runs beside the thread it is told of, begun in one and ended in another operation.
        self.lane = _ASYNC if _ASYNCHRONOUS.match(self.name) else (event.get("pid"), event.get("tid"))
        self.kind: str | None = None
        self.above: _Event | None = None
        self.counted = False  # its FLOPs, or those of what it is part of


_ASYNC: Any = "collectives"
_ASYNCHRONOUS = re.compile(r"(gloo|nccl|mpi|ucc|xccl|hccl):")


def _steps(events: Iterable[_Event], count: int | None) -> tuple[list[Span], list[Span]]:
    """Of every step, or the first `count`, the whole of it, and the wait for data it begins with."""
    steps = sorted((e.begin, e.end) for e in events if e.name == STEP and e.category == "user_annotation")
    data = sorted((e.begin, e.end) for e in events if e.name == DATA and e.category == "user_annotation")
    windows: list[Span] = []
    waits: list[Span] = []
    for begin, end in steps[:count]:
        at = bisect.bisect_right(data, (begin, math.inf)) - 1
        waited = data[at][0] if at >= 0 and (not windows or data[at][0] >= windows[-1][1]) else begin
        windows.append((waited, end))
        waits.append((waited, begin))
    return windows, waits


# ---- kinds of work -----------------------------------------------------------------------------------------------

# The first that fits decides, unless the operation is part of attention, of the optimizer or of communication. What fits none
# and is an operation at all is element-wise: norms, activations, rotary embedding, softmax, losses, look-ups, copies.
_NAMES = [
    (
        re.compile(r"(autograd|torch::autograd)::|.*Backward\d+$|ProfilerStep#|pytorch\.op"),
        None,
    ),  # what runs operations
    (re.compile(r".*(attention|attn|_sdp_|fmha)", re.IGNORECASE), "attention"),
    (
        re.compile(
            r"(aten|mkldnn|onednn|quantized|inductor)::_?(mm|addmm|bmm|baddbmm|addbmm|mv|addmv|dot|vdot|matmul|linear|einsum|"
            r"bilinear|scaled_mm|scaled_grouped_mm|grouped_mm|int_mm|weight_int\dpack_mm|mkldnn_linear|linear_pointwise|"
            r"(\w*_)?conv(olution)?(\dd)?)(\W|_activation|_forward|_backward|_overrideable|_$|$)"
        ),
        "matmul",
    ),
    (
        re.compile(r".*CompiledFxGraph|Torch-Compiled Region"),
        "element-wise",
    ),  # fused loops that have no names of their own
    (re.compile(r"\w+::"), "element-wise"),
]
_COMMUNICATION = re.compile(
    r"(c10d|_?c10d_functional|symm_mem|record_param_comms|(gloo|nccl|mpi|ucc|xccl|hccl):|nccl[A-Z]|rccl|"
    r"torch(\.|::)distributed|deepspeed_comm)"
)
_OPTIMIZER = re.compile(r"Optimizer\.(step|zero_grad)#")
_WHOLE = ("attention", "optimizer", "communication")  # all that these are made of is theirs

# Names of a GPU's kernels, for those that no operation of the trace has launched.
_KERNELS = [
    (re.compile(r"triton_(poi|red|per)_"), "element-wise"),  # torch.compile's, named after what they are fused from
    (re.compile(r"nccl|rccl", re.IGNORECASE), "communication"),
    (re.compile(r"attention|attn|fmha|flash", re.IGNORECASE), "attention"),
    (re.compile(r"(?<!fb)gemm|gemv|cutlass|cublas|nvjet|wgmma|xmma|triton_tem|matmul|Cijk_", re.IGNORECASE), "matmul"),
    (re.compile(r"multi_tensor_apply|adam|lamb", re.IGNORECASE), "optimizer"),
]


def _kind(name: str, category: str, above: str | None) -> str | None:
    """Of a host event by its name and by what it is part of; None: no work of its own."""
    if _COMMUNICATION.match(name):
        return "communication"
    if _OPTIMIZER.match(name):
        return "optimizer"
    if above in _WHOLE:
        return above
    if category == "user_annotation":
        return None
    return next((kind for pattern, kind in _NAMES if pattern.match(name)), None)


def _by_launcher(kernels: list[_Event], events: Iterable[_Event]) -> None:
    """A kernel is of the kind of the operation that launched it."""
    launchers = {e.arguments.get("External id"): e for e in events if e.category == "cpu_op"}
    for kernel in kernels:
        launcher = launchers.get(kernel.arguments.get("External id", -1))
        known = launcher.kind if launcher is not None else None
        by_name = next((kind for pattern, kind in _KERNELS if pattern.search(kernel.name)), None)
        foreign = launcher is not None and not launcher.name.startswith(("aten::", "fastllm::"))
        if by_name == "communication" or known is None or (foreign and by_name in ("matmul", "attention")):
            known = by_name or "element-wise"
        kernel.kind = known


# ---- time --------------------------------------------------------------------------------------------------------


def _own_time(events: list[_Event]) -> Iterator[tuple[_Event, float, float]]:
    """Every stretch of a thread's time with the innermost event in it. Says of every event what it is part of, and its kind."""
    lanes: dict[Any, list[_Event]] = defaultdict(list)
    for event in events:
        lanes[event.lane].append(event)
    for lane, of_lane in lanes.items():
        if lane == _ASYNC:
            for event in of_lane:
                event.kind = "communication"
                yield event, event.begin, event.end
            continue
        open_: list[_Event] = []
        at = 0.0  # up to where time is given away
        for event in sorted(of_lane, key=lambda e: (e.begin, -e.end)):
            while open_ and open_[-1].end <= event.begin:
                inner = open_.pop()
                yield inner, at, inner.end
                at = inner.end
            if open_:
                event.above = open_[-1]
                event.end = min(event.end, event.above.end)
                yield event.above, at, event.begin
            event.kind = _kind(event.name, event.category, event.above.kind if event.above else None)
            at = event.begin
            open_.append(event)
        while open_:
            inner = open_.pop()
            yield inner, at, inner.end
            at = inner.end


def _partition(spans: dict[str, list[Span]], order: Sequence[str], windows: list[Span]) -> dict[str, float]:
    """Microseconds of the windows by kind: each moment the first kind's in `order` that has it, what is left idle."""
    taken: list[Span] = []
    seconds = {}
    before = 0.0
    for kind in order:
        taken = _merged([*taken, *(c for span in spans[kind] for c in _within(span, windows))])
        seconds[kind] = _length(taken) - before
        before += seconds[kind]
    return {**seconds, "idle": max(0.0, _length(windows) - before)}


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        elif end > begin:
            merged.append((begin, end))
    return merged


def _within(span: Span, windows: list[Span]) -> Iterator[Span]:
    """The parts of a span that lie in windows, which are in order and apart."""
    for begin, end in windows:
        if begin < span[1] and span[0] < end:
            yield max(begin, span[0]), min(end, span[1])


def _length(spans: Iterable[Span]) -> float:
    return sum(end - begin for begin, end in spans)


def _operations(own: Iterable[tuple[_Event, float, float]]) -> list[Operation]:
    calls: dict[tuple[str, str], set[int]] = defaultdict(set)
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event, begin, end in own:
        key = (event.name, event.kind or "")
        calls[key].add(id(event))
        spent[key] += end - begin
    made = [Operation(*key, len(calls[key]), microseconds / 1e6) for key, microseconds in spent.items()]
    return sorted(made, key=lambda operation: -operation.seconds)


# ---- FLOPs -------------------------------------------------------------------------------------------------------


def _flops(
    events: list[_Event], windows: list[Span], waits: list[Span], documents: Sequence[Sequence[int]]
) -> tuple[dict[str, float], list[str]]:
    total = {"matmul": 0.0, "attention": 0.0}
    uncounted: set[str] = set()
    by_length: dict[int, list[Sequence[int]]] = defaultdict(list)
    for lengths in documents:
        by_length[sum(lengths)].append(lengths)
    for event in sorted(events, key=lambda e: (e.begin, -e.end)):
        event.counted = event.above is not None and event.above.counted
        if event.counted or event.kind not in total:
            continue
        inside = any(b <= event.begin < e for b, e in windows) and not any(b <= event.begin < e for b, e in waits)
        if not inside:
            continue
        name = event.name.partition("::")[2].removesuffix("_")
        found = _attention_flops(event, by_length) if event.kind == "attention" else None
        if event.kind == "matmul" and name in _PRODUCTS:
            found = _PRODUCTS[name](event.arguments.get("Input Dims") or [])
        event.counted = found is not None
        if found is not None:
            total[event.kind] += found
        elif event.kind == "attention" and "::" in event.name and _looks_like_attention(event):
            uncounted.add(event.name)
    return total, sorted(uncounted)


def _product(a: int, b: int) -> Callable[[Sequence[Any]], float | None]:
    """Of the matrices, or stacks of them, at places a and b among the arguments."""

    def flops(dims: Sequence[Any]) -> float | None:
        if len(dims) <= max(a, b) or not dims[a] or len(dims[b]) < 2:
            return None
        return 2.0 * math.prod(dims[a]) * dims[b][-1]

    return flops


def _by_weight(dims: Sequence[Any]) -> float | None:
    """Of a weight (out, in), as linear layers have it."""
    if len(dims) < 2 or not dims[0] or len(dims[1]) != 2:
        return None
    return 2.0 * math.prod(dims[0]) * dims[1][0]


def _vector(a: int) -> Callable[[Sequence[Any]], float | None]:
    return lambda dims: 2.0 * math.prod(dims[a]) if len(dims) > a and dims[a] else None


_PRODUCTS: dict[str, Callable[[Sequence[Any]], float | None]] = {
    **dict.fromkeys(("mm", "bmm", "_scaled_mm", "_int_mm", "_grouped_mm", "_scaled_grouped_mm"), _product(0, 1)),
    **dict.fromkeys(("addmm", "baddbmm", "addbmm", "_addmm_activation"), _product(1, 2)),
    **dict.fromkeys(("mkldnn_linear", "_mkldnn_linear", "_linear_pointwise"), _by_weight),
    "mv": _vector(0),
    "addmv": _vector(1),
}  # fmt: skip


def _attention_flops(event: _Event, documents: dict[int, list[Sequence[int]]]) -> float | None:
    """Of an operation that is attention's whole forward or backward pass, by the names of its arguments; None of another."""
    arguments = _named_arguments(event)
    shapes = [next((arguments[n][0] for n in names if n in arguments), None) for names in _QKV]
    if any(not shape for shape in shapes):
        return None
    q, k, v = shapes
    if q is None or k is None or v is None or len(q) != len(k):
        return None
    value = {name: text for name, (_, text) in arguments.items()}
    causal = any(value.get(n) == "True" for n in ("causal", "is_causal"))
    window = max((int(value[n]) for n in ("window",) if re.fullmatch(r"\d+", value.get(n, ""))), default=0) or None
    masked = any(name in arguments and arguments[name][0] for name in ("mask", "attn_mask", "attn_bias"))
    if len(q) == 3:  # packed: (tokens, heads, width)
        heads, pairs = q[1], _pairs_packed(documents.get(q[0]) or [[q[0]]], window, causal)
    elif len(q) == 4:
        heads, (queries, keys) = q[1], (q[2], k[2])
        if event.name.startswith(("flash_attn", "aten::_flash_attention", "aten::_efficient_attention", "xformers")):
            heads, queries, keys = q[2], q[1], k[1]
        causal = causal or (masked and queries == keys)  # a mask over all tokens of a step hides what is to come
        if q[0] == 1 and queries == keys in documents:  # the mask keeps the rows of a packed batch apart
            pairs = _pairs_packed(documents[keys], window, causal)
        else:
            pairs = q[0] * visible_pairs(queries, keys, window, causal=causal)
    else:
        return None
    forward = 2.0 * heads * (q[-1] + v[-1]) * pairs
    return forward * (2 if re.search(r"backward|bwd", event.name) else 1)


def _pairs_packed(batches: Sequence[Sequence[int]], window: int | None, causal: bool) -> float:
    """Of one batch, the mean over those that have as many tokens."""
    return sum(visible_pairs(n, n, window, causal=causal) for lengths in batches for n in lengths) / len(batches)


_QKV = (("q", "query"), ("k", "key", "k_cache"), ("v", "value", "v_cache"))


def _named_arguments(event: _Event) -> dict[str, tuple[Any, str]]:
    """Shape and text of every argument by its name in the operation's schema; empty where PyTorch knows no such operation."""
    dims = event.arguments.get("Input Dims") or []
    texts = event.arguments.get("Concrete Inputs") or [""] * len(dims)
    library, _, name = event.name.partition("::")
    try:
        packet = getattr(getattr(torch.ops, library), name)
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    except (AttributeError, RuntimeError):
        return {}
    schema = next((s for s in schemas if len(s.arguments) == len(dims)), None)
    if schema is None:
        return {}
    return {a.name: (dims[n], texts[n] if n < len(texts) else "") for n, a in enumerate(schema.arguments)}


def _looks_like_attention(event: _Event) -> bool:
    """Whether it has queries, keys and values at all: merging and choosing a kernel are attention's business without FLOPs."""
    dims = event.arguments.get("Input Dims") or []
    return sum(len(d) in (3, 4) for d in dims if isinstance(d, list)) >= 3 and not (event.above and event.above.counted)
