"""The configurations that are compiled and inspected without a GPU."""

from __future__ import annotations

from typing import Any

import torch

from fastllm.kernels.triton._launch import Configuration, Work, triton_type
from fastllm.kernels.triton.attention import mask_blocks
from fastllm.kernels.triton.attention.backward_pass import delta_kernel, delta_rows, key_value_kernel, query_kernel
from fastllm.kernels.triton.attention.call import width_of
from fastllm.kernels.triton.attention.decoding import decode_kernel, decode_tiles, join_kernel
from fastllm.kernels.triton.attention.forward_pass import forward_kernel
from fastllm.kernels.triton.attention.tiles import Tiles, is_dense, passes, tiles_for

_ROWS = (
    (64, torch.bfloat16),
    (128, torch.bfloat16),
    (256, torch.bfloat16),
    (256, torch.float32),
)  # of kernels without products


def configurations() -> list[Configuration]:
    """Head dims of models, in bf16 (fp16 takes the same registers and instructions) and fp32, and the masks that models use at
    head dim 128; token and head strides are multiples of 16, as projections leave them."""
    dense = {"CAUSAL": True}
    cases: list[tuple[str, int, torch.dtype, dict[str, bool]]] = [
        ("causal", 64, torch.bfloat16, dense),
        ("causal", 128, torch.bfloat16, dense),
        ("causal", 128, torch.float32, dense),
        ("causal", 256, torch.bfloat16, dense),
        ("window and sinks", 128, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "SINKS": True}),
        ("packed", 128, torch.bfloat16, {"CAUSAL": True, "PACKED": True}),
        ("mask", 128, torch.bfloat16, {"MASK": True}),
        ("window, cap", 256, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "CAP": True}),
        ("window, sink logits", 64, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "SINK_LOGITS": True}),
    ]
    return [c for case in cases for c in _shipped(*case)] + [
        _shipped_decode(128, torch.bfloat16, 4), _shipped_decode(64, torch.bfloat16, 8), _shipped_decode(128, torch.float32, 4),
        *(f(width, dtype) for f in (_shipped_delta, _shipped_join) for width, dtype in _ROWS),
        *mask_blocks.configurations(),
    ]  # fmt: skip


def _shipped(name: str, width: int, dtype: torch.dtype, flags: dict[str, bool]) -> list[Configuration]:
    names = ("CAUSAL", "WINDOW", "SINKS", "MASK", "CAP", "ALIBI", "PACKED")
    constants: dict[str, Any] = {n: flags.get(n, False) for n in names}
    constants |= {"D": width, "BLOCK_D": width, "DV": width, "BLOCK_DV": width, "mask_k": 1}
    t, matrix = triton_type(dtype), dtype != torch.float32
    signature = {
        n: t for n in ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr", "out_ptr")
    }
    signature |= {"list_ptr": "*i32", "count_ptr": "*i32"} | dict.fromkeys(
        ("list_batch", "list_head", "list_length"), "i32"
    )
    signature |= dict.fromkeys(("lse_ptr", "lost_ptr", "delta_ptr", "sink_ptr", "slope_ptr"), "*fp32")
    signature |= {"mask_ptr": "*u8", **dict.fromkeys(("table_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")}
    for part in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"):
        signature |= {f"{part}_batch": "i64:16", f"{part}_head": "i32:16", f"{part}_token": "i32:16"}
    signature |= {"mask_batch": "i64:16", "mask_head": "i64:16", "mask_q": "i32:16"}
    signature |= dict.fromkeys(("blocks", "heads", "group", "queries", "keys", "tokens", "window", "sinks"), "i32")
    signature |= dict.fromkeys(("scale", "scale_log2", "cap_in", "cap_out"), "fp32")
    heads, length, seen = 16, 16384, 4100 if flags.get("WINDOW") else 8192
    rows = heads * length
    label = f"{name} {t[1:]} head dim {width}"
    shape = f"1×{heads}×{length}×{width}" + (", window 4096" if flags.get("WINDOW") else "")
    found = []
    for kernel, name_of, what, products, tensors in (
        (forward_kernel, "forward", "forward", 2, 4),
        (key_value_kernel, "key_value", "backward of keys and values", 4, 6),
        (query_kernel, "query", "backward of queries", 3, 5),
    ):
        fixed = dict(constants)
        if kernel is not key_value_kernel:
            fixed["DENSE"] = is_dense(constants, dtype)
        if kernel is forward_kernel:
            fixed["SINK_LOGITS"] = flags.get("SINK_LOGITS", False)
        fixed["PRECISE"] = dtype == torch.float32
        work = Work(shape, tensors * rows * width * dtype.itemsize, products * 2 * rows * seen * width)
        launches = passes(constants, dtype) if kernel is key_value_kernel else ((True, True),)
        for grad_k, grad_v in launches:
            part = what if len(launches) == 1 else f"backward of {'keys' if grad_k else 'values'}"
            if kernel is key_value_kernel:
                fixed |= {"GRAD_K": grad_k, "GRAD_V": grad_v}
            for tiles, chips in _by_tiles(name_of, constants, dtype).items():
                options = tiles.options()
                launch = {n: options.pop(n) for n in ("num_warps", "num_stages")}
                block = tiles.m if kernel is key_value_kernel else tiles.n
                described = {
                    n: f"tensordesc<{t[1:]}[1, 1, {block}, {width}]>" for n in _READ[kernel] if tiles.descriptors
                }
                how = "/".join(chips) + (", TMA" if tiles.descriptors else "")
                configuration = Configuration(
                    kernel, signature | described, fixed | options, **launch, matrix=matrix, work=work, targets=chips,
                    label=f"attention {part}, {label} ({how})",
                )  # fmt: skip
                found.append(configuration)
    return found


# What the inner loop of each kernel reads, as described where descriptors serve.
_READ = {
    forward_kernel: ("k_ptr", "v_ptr"),
    key_value_kernel: ("q_ptr", "grad_ptr"),
    query_kernel: ("k_ptr", "v_ptr"),
}


def _by_tiles(kernel: str, flags: dict[str, Any], dtype: torch.dtype) -> dict[Tiles, tuple[str, ...]]:
    chips: dict[Tiles, tuple[str, ...]] = {}
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for describable in {not flags["PACKED"], False}:
            tiles = tiles_for(kernel, flags, dtype, chip, describable)
            chips[tiles] = tuple(dict.fromkeys((*chips.get(tiles, ()), chip)))
    return chips


def _shipped_decode(width: int, dtype: torch.dtype, group: int) -> Configuration:
    t = triton_type(dtype)
    signature = {"q_ptr": t, "k_ptr": t, "v_ptr": t, "lengths_ptr": "*i32"}
    signature |= dict.fromkeys(("slope_ptr", "sums_ptr", "stats_ptr"), "*fp32")
    for part in ("q", "k", "v"):
        signature |= {f"{part}_batch": "i64:16", f"{part}_head": "i32:16", f"{part}_token": "i32:16"}
    signature |= dict.fromkeys(("kv_heads", "group", "queries", "window", "sinks"), "i32")
    signature |= dict.fromkeys(("scale_log2", "cap_in", "cap_out"), "fp32")
    constants = {
        "D": width,
        "BLOCK_D": width,
        "DV": width,
        "BLOCK_DV": width,
        "M": width_of(group),
        "N": decode_tiles(dtype)[0],
    }
    constants |= {"WINDOW": False, "SINKS": False, "CAP": False, "ALIBI": False}
    work = Work(f"16×8×16384×{width}", 2 * 16 * 8 * 16384 * width * dtype.itemsize)
    return Configuration(
        decode_kernel, signature, constants, num_warps=decode_tiles(dtype)[1], num_stages=2,
        label=f"attention decode, group {group} {t[1:]} head dim {width}", work=work,
    )  # fmt: skip


def _shipped_delta(width: int, dtype: torch.dtype) -> Configuration:
    t, rows = triton_type(dtype), 16 * 16384
    signature = {"out_ptr": t, "grad_ptr": t, "grad_lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    for part in ("out", "grad"):
        signature |= {f"{part}_batch": "i64:16", f"{part}_head": "i32:16", f"{part}_token": "i32:16"}
    signature |= dict.fromkeys(("blocks", "heads", "tokens"), "i32")
    constants = {"HAS_GRAD_LSE": False, "DV": width, "BLOCK_DV": width, "M": delta_rows(width, dtype.itemsize)}
    return Configuration(
        delta_kernel, signature, constants, num_stages=3,
        label=f"attention backward, row sums {t[1:]} head dim {width}",
        work=Work(f"1×16×16384×{width}", rows * (2 * width * dtype.itemsize + 4)),
    )  # fmt: skip


def _shipped_join(width: int, dtype: torch.dtype) -> Configuration:
    t, rows, splits = triton_type(dtype), 16 * 32, 8
    signature = {n: "*fp32" for n in ("sums_ptr", "stats_ptr", "sink_ptr", "lse_ptr")} | {"out_ptr": t}
    signature |= {"out_batch": "i64:16", "out_head": "i32:16", "out_token": "i32:16"}
    signature |= dict.fromkeys(("heads", "queries", "splits"), "i32")
    return Configuration(
        join_kernel, signature, {"SINK_LOGITS": False, "DV": width, "BLOCK_DV": width}, num_stages=3,
        label=f"attention decode, join of {splits} {t[1:]} head dim {width}",
        work=Work(f"16×32×1×{width}, 8 shares", rows * (splits * (width + 2) * 4 + width * dtype.itemsize)),
    )  # fmt: skip
