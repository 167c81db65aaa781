"""Angles that are right at any position: as a table after extend_context, inside the kernel of a patched model."""

import inspect

import pytest
import torch

import fastllm
from fastllm import rope
from fastllm.rope import angles
from tests.patching.models import llama, tokens
from tests.rope.test_extend import FAMILIES, LONG, model_of

FAR = 4_000_000


def error_of_table(module, position=FAR):
    """Largest difference of the module's cosines and sines from those of the exact angle."""
    cos, sin = module(torch.zeros(1), torch.arange(position, position + 5)[None])
    turns = torch.arange(position, position + 5).double()[None, :, None] * module.inv_freq.double()
    turns = torch.cat((turns, turns), -1)
    exact = (turns.cos() * module.attention_scaling, turns.sin() * module.attention_scaling)
    return max(float((a - b).abs().max()) for a, b in zip((cos, sin), exact))


@pytest.mark.parametrize("method", [m for m in rope.METHODS if m != "default"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_extended_model_has_exact_angles_far_away(method, dtype):
    model = llama(dtype, max_position_embeddings=64, head_dim=16).eval()
    rotary = model.model.rotary_emb
    assert error_of_table(rotary) > 1e-3  # of transformers' own, with which there would be nothing to show
    rope.extend_context(model, 256, method, **(LONG if method == "longrope" else {}))
    assert error_of_table(rotary) < 1e-5
    rope.restore_context(model)
    assert "forward" not in rotary.__dict__


@pytest.mark.parametrize("method", [None, "yarn", "ntk"])
def test_a_patched_model_reads_far_away_as_near(method):
    model = llama(max_position_embeddings=64).eval()
    if method:
        rope.extend_context(model, 256, method)
    ids, near = tokens(2, 9), torch.arange(9)[None].expand(2, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=near).logits
        fastllm.patch(model)
        assert carried(model.model.rotary_emb)
        torch.testing.assert_close(model(ids, position_ids=near).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids, position_ids=near + FAR).logits, expected, rtol=1e-5, atol=1e-5)


def carried(rotary):
    return rotary.__dict__["forward"].settings["carried"]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_hand_on_their_angles(family):
    model = model_of(family)
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        fastllm.patch(model, "rope")
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    skipped = family == "gpt_oss"  # whose rotation is none that the rule knows
    assert isinstance(rotary.__dict__.get("forward"), fastllm.patching.replacement.Replacement)
    assert carried(rotary) or skipped
    fastllm.unpatch(model)
    assert "forward" not in rotary.__dict__


def test_where_one_reader_is_not_ours_there_is_a_table_and_it_is_exact():
    model = llama(max_position_embeddings=64).eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        fastllm.patch(model, exclude=["model.layers.1.self_attn"])
        rotary = model.model.rotary_emb
        assert not carried(rotary)
        assert error_of_table(rotary) < 1e-5
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_patch_and_an_extension_come_and_go_in_any_order():
    model = llama(max_position_embeddings=64).eval()
    rotary = model.model.rotary_emb
    before, own = model(tokens()).logits, set(rotary.__dict__)
    fastllm.patch(model)
    rope.extend_context(model, 256, "yarn")
    fastllm.unpatch(model)
    assert error_of_table(rotary) < 1e-5  # extended still
    fastllm.patch(model)
    rope.restore_context(model)
    rope.extend_context(model, 256, "dynamic")
    fastllm.unpatch(model)
    assert error_of_table(rotary) < 1e-5
    rope.restore_context(model)
    assert set(rotary.__dict__) - own <= {"max_seq_len_cached", "original_max_seq_len"}
    assert torch.equal(model(tokens()).logits, before)


def test_positions_of_several_kinds_take_the_classes_own_forward():
    rotary = llama(max_position_embeddings=64).model.rotary_emb
    table = angles.table_of(rotary)
    x, positions = torch.zeros(1), torch.arange(24).view(3, 2, 4)
    ours, theirs = table(x, positions), inspect.unwrap(type(rotary).forward)(rotary, x, positions)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_angles_cannot_be_taken_for_numbers():
    q, found = torch.ones(1), angles.Angles(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), 1.0)
    for use in (lambda: q * found, lambda: found.unsqueeze(1), lambda: torch.cos(found), lambda: found[..., :1]):
        with pytest.raises((TypeError, AttributeError)):
            use()
