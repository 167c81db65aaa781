import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import attention, decode_attention
from tests.ops.harness import each_backend, each_dtype


@st.composite
def calls(draw):
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 4, 8]))
    shape = (draw(st.sampled_from([1, 3])), kv_heads, group, draw(st.sampled_from([1, 1, 2, 5, 19])))
    room = draw(st.sampled_from([1, 5, 64, 65, 300, 700]))
    widths = (draw(st.sampled_from([8, 20, 64, 128])), draw(st.sampled_from([8, 64, 72])))
    options = {
        "window": draw(st.sampled_from([None, 1, 7, 100])),
        "sinks": draw(st.sampled_from([0, 3, 70])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    vectors = {n: draw(st.booleans()) for n in ("sink_logits", "alibi_slopes")}
    lengths = [draw(st.integers(0, room)) for _ in range(shape[0])]
    return shape, room, widths, options, vectors, lengths, draw(st.sampled_from([torch.int32, torch.int64]))


@each_backend
@each_dtype
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(call=calls())
def test_is_attention_over_what_each_cache_holds(call, dtype, backend, device):
    (batch, kv_heads, group, queries), room, (width, value_width), options, vectors, lengths, of_lengths = call
    heads = kv_heads * group
    generator = torch.Generator().manual_seed(room)
    q, k, v = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in (
            (batch, heads, queries, width),
            (batch, kv_heads, room, width),
            (batch, kv_heads, room, value_width),
        )
    )
    for row, length in enumerate(lengths):  # what lies beyond a row's tokens is not read
        k[row, :, length:], v[row, :, length:] = float("nan"), float("nan")
    more = {n: torch.rand(heads, generator=generator) if there else None for n, there in vectors.items()}

    def to(tensors, place):
        return {n: None if t is None else t.to(place) for n, t in tensors.items()}

    with fastllm.use_backend(backend):
        out, lse = decode_attention(
            *(t.to(device) for t in (q, k, v)), torch.tensor(lengths, dtype=of_lengths, device=device), **options,
            **to(more, device), return_lse=True,
        )  # fmt: skip
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    for row, length in enumerate(lengths):
        one = (t[row : row + 1].double() for t in (q, k[:, :, :length], v[:, :, :length]))
        exact, exact_lse = attention(*one, **options, **to(more, torch.float64), return_lse=True)
        tolerance = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out[row : row + 1].cpu().double(), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(lse[row : row + 1].cpu().double(), exact_lse, rtol=1e-5, atol=1e-4)


def test_gradients_are_the_definitions():
    q, k, v = (torch.randn(2, n, m, 16, requires_grad=True) for n, m in ((4, 1), (2, 20), (2, 20)))
    lengths = torch.tensor([20, 20])
    found = torch.autograd.grad(decode_attention(q, k, v, lengths).square().sum(), (q, k, v))
    expected = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_opcheck_and_compile():
    arguments = (torch.randn(2, 4, 1, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16), torch.tensor([20, 7]))
    torch.library.opcheck(torch.ops.fastllm.decode_attention.default, (*arguments, None, None, 0.25, 0, 0, 0.0))
    compiled = torch.compile(decode_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments, window=5), decode_attention(*arguments, window=5))
    assert decode_attention(*(t[:0] for t in arguments)).shape == (0, 4, 1, 16)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([1.0, 2.0]), TypeError, "int32 or int64"),
        (torch.tensor([3]), ValueError, r"cache_lengths must have shape \(2,\)"),
        (torch.tensor([3, 21]), ValueError, r"0 \.\. S = 20, got \[3, 21\]"),
        (torch.tensor([-1, 3]), ValueError, r"got \[-1, 3\]"),
        ([3, 3], TypeError, "cache_lengths must be a tensor"),
    ],
)
def test_bad_lengths(lengths, error, message):
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    with pytest.raises(error, match=message):
        decode_attention(q, k, v, lengths)


@each_backend
def test_gradients_are_blind_to_what_lies_beyond_a_row(backend, device):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (1, 10, 10))
    k[:, :, 4:], v[:, :, 4:] = float("nan"), float("nan")
    with fastllm.use_backend(backend):
        leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
        found = torch.autograd.grad(decode_attention(*leaves, torch.tensor([4], device=device)).sum(), leaves)
    assert all(g.isfinite().all() for g in found)
    assert not any(g[:, :, 4:].any() for g in found[1:])
