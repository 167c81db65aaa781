"""What the Triton attention kernels do that their results do not show: which blocks they leave alone, and what they are
given on chips other than this one. In the interpreter without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import attention
from tests.ops.harness import DEVICE
from tests.ops.test_attention import check, tensors

pytest.importorskip("triton")
from fastllm.kernels.triton.attention import call, configurations, mask_blocks, tiles

NAN = float("nan")


@st.composite
def masks(draw):
    queries, keys = draw(st.sampled_from([1, 7, 64, 130])), draw(st.sampled_from([0, 1, 64, 130, 300]))
    shape = [draw(st.sampled_from(sizes)) for sizes in ([1, 2], [1, 3], [1, queries], [1, keys])]
    blocks = draw(st.sampled_from([(16, 16), (64, 32), (128, 64)]))
    options = draw(st.booleans()), draw(st.sampled_from([0, 1, 70])), draw(st.sampled_from([0, 3]))
    return (queries, keys), shape, draw(st.sampled_from([0.0, 0.01, 0.5, 0.999, 1.0])), blocks, options


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(drawn=masks(), of_queries=st.booleans(), seed=st.integers(0, 2**20))
def test_the_lists_hold_the_blocks_in_which_anything_is_seen(drawn, of_queries, seed):
    (queries, keys), shape, share, (m, n), (causal, window, sinks) = drawn
    torch.manual_seed(seed)
    mask = (torch.rand(shape) < share).expand(2, 3, queries, keys)
    p, j = torch.arange(queries).unsqueeze(1) + keys - queries, torch.arange(keys)
    seen = mask & (j <= p if causal else True)
    seen &= (p - j < window) | (j < sinks) if window else True
    found = mask_blocks.mask_lists(mask.to(DEVICE).view(torch.uint8), of_queries, m, n, causal, window, sinks)
    rows = found.batch + 2 * found.head + 1 if found.batch * found.head else max(2 * found.batch, 3 * found.head, 1)
    assert found.counts.shape[0] == (6 if found.batch and found.head else rows)
    for batch in range(2):
        for head in range(3):
            row = batch * found.batch + head * found.head
            for own in range(found.counts.shape[1]):
                whole, partly = set(), set()
                for other in range(found.length):
                    a, b = (own, other) if of_queries else (other, own)
                    pairs = seen[batch, head, a * m : (a + 1) * m, b * n : (b + 1) * n]
                    if pairs.all() and (b + 1) * n <= keys:
                        whole.add(other)
                    elif pairs.any():
                        partly.add(other)
                every, some = found.counts[row, own].tolist()
                blocks = found.blocks[row, own].tolist()
                assert (len(whole), len(partly)) == (every, some)
                assert set(blocks[:every]) == whole
                assert set(blocks[found.length - some :]) == partly


def test_blocks_that_a_mask_hides_are_neither_read_nor_computed():
    # In fp32 the kernels hold at most 32 queries or keys: what lies in other blocks may be NaN.
    q, k, v = (t.to(DEVICE) for t in tensors(1, 1, 1, 64, 96, 16, 16))
    mask = torch.zeros(1, 1, 64, 96, dtype=torch.bool, device=DEVICE)
    mask[..., :32, 64:] = torch.rand(32, 32, device=DEVICE) > 0.3
    results = []
    with fastllm.use_backend("triton"):
        for hidden in (0.0, NAN):
            q[:, :, 32:], k[:, :, :64], v[:, :, :64] = hidden, hidden, hidden
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            out = attention(*leaves, mask=mask, causal=False)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results):
        assert torch.equal(a, b)
    assert (results[1][0][:, :, 32:] == 0).all()


CASES = {
    "causal": {},
    "window, sinks and what bends scores": {
        "window": 40, "sinks": 3, "softcap": 2.0, "sink_logits": True, "alibi_slopes": True,
    },
    "more keys, and a mask for each head": {"mask": (1, 0), "causal": False, "keys": 90},
    "padding": {"mask": (0, 1)},
}  # fmt: skip


@pytest.fixture
def on(monkeypatch):
    return lambda chip: monkeypatch.setattr(call, "chip_of", lambda device: chip)


@pytest.mark.skipif(DEVICE != "cpu", reason="another chip's kernels run in the interpreter only")
@pytest.mark.parametrize(("chip", "case"), [*(("sm_90", case) for case in CASES), ("sm_100", "causal")])
def test_blocks_by_descriptor_are_as_exact(chip, case, on, monkeypatch):
    on(chip)
    options = dict(CASES[case])
    keys = options.pop("keys", 70)
    wide, narrow = (40, 72) if case == "causal" else (16, 16)  # 40 and 72 channels in blocks of 64 and 128
    q, k, v = tensors(2, 2, 1, 70, keys, wide, narrow)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if "mask" in options:
        by_head, for_all = options["mask"]
        mask = torch.rand(2, 2 if by_head else 1, 1 if for_all else 70, keys) > 0.4
        mask[..., 64:], mask[:1, ..., :64] = False, True
        options["mask"] = mask
    for name in ("sink_logits", "alibi_slopes"):
        if name in options:
            options[name] = torch.rand(2)
    made = []
    describe = call.TensorDescriptor
    monkeypatch.setattr(call, "TensorDescriptor", lambda *how: made.append(how) or describe(*how))
    check(q, k, v, torch.bfloat16 if chip == "sm_90" else torch.float16, "triton", **options)
    assert len(made) == len({kernel for kernel, of in tiles.DESCRIPTOR_TILES if of == chip}) * 2


def test_descriptors_serve_what_the_memory_engine_can_copy():
    whole = torch.zeros(2, 4, 32, 64, dtype=torch.bfloat16)
    assert call.describable(whole, whole.transpose(1, 2), whole[:1].expand(1, 4, 32, 64))
    assert call.describable(whole[:, :, 1:], whole[..., 8:16])
    refused = {
        "four bytes": whole.float(),
        "packed": whole[0],
        "no tokens": whole[:, :, :0],
        "not on a multiple of 16 bytes": whole[..., 4:12],
        "rows of 20 bytes": torch.zeros(2, 4, 32, 10, dtype=torch.bfloat16),
        "one tensor for every batch": whole[:1].expand(2, 4, 32, 64),
    }
    assert not [why for why, t in refused.items() if call.describable(t)]
    assert not call.describable(whole, refused["packed"])


@pytest.mark.skipif(DEVICE != "cpu", reason="another chip's kernels run in the interpreter only")
def test_what_descriptors_cannot_serve_is_read_without(on):
    on("sm_90")
    q, k, v = tensors(2, 1, 1, 20, 20, 16, 16)
    check(q, k[:1].expand(2, -1, -1, -1), v[:1].expand(2, -1, -1, -1), torch.bfloat16, "triton")
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    check(*packed, torch.bfloat16, "triton", cu_seqlens_q=bounds)


OLDER = [((7, 5), "sm_80"), ((8, 9), "sm_80"), ((12, 0), "sm_80")]


@pytest.mark.parametrize(("capability", "chip"), [*OLDER, ((9, 0), "sm_90"), ((10, 0), "sm_100")])
def test_only_chips_with_descriptors_are_given_them(capability, chip, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert tiles.chip_of(torch.device("cuda")) == chip


def test_what_ships_for_a_chip_is_described_where_its_kernels_are():
    with_descriptors = {
        (c.kernel.__name__, chip) for c in configurations() if c.constants.get("DESCRIPTORS") for chip in c.targets
    }
    assert with_descriptors == {(f"{kernel}_kernel", chip) for kernel, chip in tiles.DESCRIPTOR_TILES}
    without = {
        (c.kernel.__name__, chip) for c in configurations() if not c.constants.get("DESCRIPTORS") for chip in c.targets
    }
    assert with_descriptors <= without  # for strides that descriptors cannot serve


@pytest.mark.parametrize(("chip", "matrix"), [("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")])
def test_the_inner_loop_is_fed_by_the_memory_engine(chip, matrix, tmp_path):
    rows = tmp_path / "rows.json"
    label = f"attention forward, causal bf16 head dim 64 ({chip}, TMA)"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "static", "--target", chip, "--match", label, "--json", str(rows)],
        env={n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(rows.read_text())
    assert row["matrix_instructions"][matrix] > 0 == row["spilled_bytes"]
    assert row["loads"]["TMA"] > 0
    stage = 2 * (64 if chip == "sm_100" else 128) * 64 * 2  # bytes of a block of keys and one of values
    assert row["shared_bytes"] >= 2 * stage + 128 * 64 * 2  # two of both, and the queries
