"""dilated_attention and merge_attention, which are made of attention, against their definitions."""

import pytest
import torch

from fastllm import ops
from fastllm.ops import dilated_attention, merge_attention

Q = torch.randn(1, 2, 6, 8)


def dilated(length, segments, rates, heads):
    """Which keys a query sees in each pattern, from the definition: (patterns, heads, L, L)."""
    p = torch.arange(length)
    held = torch.stack([torch.stack([p % w % r == h % r for h in range(heads)]) for w, r in zip(segments, rates)])
    same = torch.stack([(p.unsqueeze(1) // w == p // w) & (p <= p.unsqueeze(1)) for w in segments])
    return held.unsqueeze(-1) & held.unsqueeze(-2) & same.unsqueeze(1)


def test_dilated_attention_is_its_definition_padded_or_not():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 30, 16, dtype=torch.double, requires_grad=True) for n in (6, 2, 2))
    segments, rates = [5, 12, 30], [1, 2, 4]
    for padding in (None, torch.rand(2, 30) > 0.3):
        seen = dilated(30, segments, rates, 6)[:, None]
        seen = seen if padding is None else seen & padding[None, :, None, None]
        scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / 4
        lses = torch.stack([torch.logsumexp(scores.masked_fill(~s, -torch.inf), -1) for s in seen])
        outs = [
            torch.softmax(scores.masked_fill(~s, -torch.inf), -1).nan_to_num() @ v.repeat_interleave(3, 1) for s in seen
        ]
        mixing = torch.softmax(lses, 0).nan_to_num()
        expected = sum(w.unsqueeze(-1) * o for w, o in zip(mixing, outs))
        found = ops.dilated_attention(q, k, v, segments, rates, key_mask=padding)
        torch.testing.assert_close(found, expected)
        single = ops.dilated_attention(q.float(), k.float(), v.float(), segments, rates, key_mask=padding)
        torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)
        if padding is None:
            gradients = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, expected)]
            for a, b in zip(*gradients):
                torch.testing.assert_close(a, b)


def test_merging_parts_gives_the_whole():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 16, requires_grad=True) for _ in range(3))
    whole, lse = ops.attention(q, k, v, causal=False, return_lse=True)
    parts = [
        ops.attention(q, k[:, :, a:b], v[:, :, a:b], causal=False, return_lse=True) for a, b in ((0, 4), (4, 4), (4, 9))
    ]
    out, merged = ops.merge_attention(*zip(*parts))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(merged, lse)
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, whole))):
        torch.testing.assert_close(a, b)
    blind = ops.merge_attention(torch.full((2, 3, 4), 7.0), torch.full((2, 3), -torch.inf))
    assert (blind[0] == 0).all()
    assert (blind[1] == -torch.inf).all()
    with pytest.raises(ValueError, match="as many"):
        ops.merge_attention([whole], [lse, lse])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([4], [1, 2]), {}, ValueError, r"must pair up, .*got \[4\] and \[1, 2\]"),
        (([], []), {}, ValueError, "at least one pair"),
        (([4], [0]), {}, ValueError, "all at least 1"),
        (([4], [1]), {"key_mask": [[True]]}, TypeError, "key_mask must be a tensor, got list"),
        (([4], [1]), {"key_mask": torch.ones(1, 5, dtype=torch.bool)}, ValueError, r"\(B, L\) = \(1, 6\)"),
    ],
)
def test_bad_patterns(arguments, options, error, message):
    with pytest.raises(error, match=message):
        dilated_attention(Q, Q, Q, *arguments, **options)


def test_no_heads_and_no_tokens_give_nothing():
    assert dilated_attention(Q[:, :0], Q, Q, [4, 6], [1, 2]).shape == (1, 0, 6, 8)
    none = Q[:, :, :0]
    assert dilated_attention(none, none, none, [4, 6], [1, 2]).shape == (1, 2, 0, 8)


def test_bad_parts():
    with pytest.raises(ValueError, match="outs must have at least 1 dimension"):
        merge_attention(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(ValueError, match="as many, at least one, got 0 and 0"):
        merge_attention([], [])
