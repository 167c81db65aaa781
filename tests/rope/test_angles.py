"""Angles that are right at any position: as a table after extend_context, inside the kernel of a patched model."""

import copy
import inspect
from contextlib import contextmanager

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
        torch.testing.assert_close(model(ids, position_ids=near).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(ids, position_ids=near + FAR).logits, expected, rtol=1e-5, atol=1e-5)


@contextmanager
def no_table():
    """Fails where a table is computed in place of angles."""
    compute = angles.Angles._compute

    def refused(self):
        raise AssertionError("a table was computed")

    angles.Angles._compute = refused
    try:
        yield
    finally:
        angles.Angles._compute = compute


@pytest.mark.parametrize("family", FAMILIES)
def test_families_hand_on_their_angles(family):
    model = model_of(family)
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        if family == "gpt_oss":  # whose rotation is none that the rule knows
            with pytest.warns(UserWarning, match="changed nothing"):
                fastllm.patch(model, "rope")
            assert torch.equal(model(ids, use_cache=False).logits, expected)
        else:
            fastllm.patch(model, "rope")
            with no_table():
                torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    fastllm.unpatch(model)
    assert "forward" not in rotary.__dict__


def test_where_one_reader_is_not_ours_there_is_a_table_and_it_is_exact():
    model = llama(max_position_embeddings=64).eval()
    ids = tokens(1, 12)
    with torch.no_grad():
        expected = model(ids).logits
        fastllm.patch(model, exclude=["model.layers.1.self_attn"])
        assert error_of_table(model.model.rotary_emb) < 1e-5
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


def seen_by_a_hook(model):
    shapes = []

    def hook(module, args, kwargs):
        shapes.append(kwargs["position_embeddings"][0].shape)

    model.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    return shapes


READERS = {
    "unpatched layer": lambda model: fastllm.unpatch(model.model.layers[0]),
    "other layer": lambda model: model.model.layers.__setitem__(1, copy.deepcopy(llama().model.layers[1]).eval()),
    "hook": seen_by_a_hook,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_that_comes_after_the_patch_reads_a_table(reader):
    models = [llama(max_position_embeddings=64).eval() for _ in range(2)]
    fastllm.patch(models[0])
    seen = [READERS[reader](model) for model in models]
    ids = tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids).logits, models[1](ids).logits, rtol=1e-5, atol=1e-5)
    assert seen[0] == seen[1] or reader != "hook"
    cos, sin = models[0].model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
    assert cos.shape == sin.shape == (1, 4, 16)


def test_adapters_that_rotate_queries_themselves_come_after_the_patch():
    peft = pytest.importorskip("peft")
    ids, found = tokens(1, 12), []
    for patched in (False, True):
        model = llama(num_key_value_heads=4).eval()
        if patched:
            fastllm.patch(model)
        torch.manual_seed(0)
        config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
        found.append(peft.get_peft_model(model, config)(ids).logits)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_positions_between_whole_numbers():
    model, ids = llama(max_position_embeddings=64).eval(), tokens(1, 12)
    positions = torch.arange(12)[None] / 2
    with torch.no_grad():
        expected = model(ids, position_ids=positions).logits
        fastllm.patch(model)
        torch.testing.assert_close(model(ids, position_ids=positions).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["olmo2", "llama"])
def test_a_table_keeps_the_dtype_of_the_classes_own(family):
    model = (
        model_of(family).to(torch.bfloat16)
        if family != "llama"
        else llama(torch.bfloat16, max_position_embeddings=64).eval()
    )
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    x, positions = torch.zeros(1, dtype=torch.bfloat16), torch.arange(5)[None]
    own = rotary(x, positions)[0].dtype
    assert own == (torch.float32 if family == "olmo2" else torch.bfloat16)
    rope.extend_context(model, 256, "yarn", original_length=64)
    assert rotary(x, positions)[0].dtype == own
    before = model(tokens(1, 12)).logits
    fastllm.patch(model, "rope")
    torch.testing.assert_close(model(tokens(1, 12)).logits, before, rtol=5e-2, atol=5e-2)


def test_hooks_of_accelerate_may_come_in_between():
    accelerate = pytest.importorskip("accelerate")
    model = llama(max_position_embeddings=64).eval()
    with torch.no_grad():
        before = model(tokens(1, 12)).logits
        rope.extend_context(model, 256, "yarn")
        accelerate.cpu_offload(model, torch.device("cpu"))
        rope.restore_context(model)
        assert torch.equal(model(tokens(1, 12)).logits, before)
        rope.extend_context(model, 256, "ntk")
        assert error_of_table(model.model.rotary_emb) < 1e-5
        rope.restore_context(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert torch.equal(model(tokens(1, 12)).logits, before)
    assert not angles.installed(model.model.rotary_emb)


def test_extended_in_inference_mode_a_model_still_trains():
    model = llama(max_position_embeddings=64)
    with torch.inference_mode():
        rope.extend_context(model, 256, "yarn")
    fastllm.patch(model)
    model(tokens(), labels=tokens()).loss.backward()


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
    x, positions = torch.zeros(1), torch.arange(12).view(3, 1, 4)
    ours, theirs = table(x, positions), inspect.unwrap(type(rotary).forward)(rotary, x, positions)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
