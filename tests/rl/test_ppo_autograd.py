"""ppo_loss under autograd: gradients of gradients, graphs that are kept, gradients that are changed, checkpoints."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm.ops._ppo_loss import AGGREGATIONS, KL_ESTIMATORS, LEVELS, VARIANTS
from fastllm.rl import ppo_loss
from tests.rl.test_ppo import COEFS, LEARNT, batch, given_without_nan, run


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "cispo"])  # whose gradient is not its value's
def test_gradients_are_those_of_the_value(level, aggregation, variant):
    given = {n: t if n == "mask" else t.nan_to_num() for n, t in batch(3, 4).items()}
    learnt = [given.pop(name).requires_grad_() for name in LEARNT]
    for estimator, dual_clip in zip(KL_ESTIMATORS, (None, 1.5, 3.0)):
        how = {"level": level, "aggregation": aggregation, "variant": variant, "kl_estimator": estimator}
        how["dual_clip"] = dual_clip if variant == "ppo" else None

        def loss(*learnt):
            return ppo_loss(**given, **dict(zip(LEARNT, learnt)), **COEFS, **how).loss  # noqa: B023

        torch.autograd.gradcheck(loss, learnt, fast_mode=True)


def test_second_derivative_through_the_kernel():
    given = {n: t if n == "mask" else t.nan_to_num() for n, t in batch(3, 4).items()}
    learnt = [given[name].requires_grad_() for name in LEARNT]
    torch.autograd.gradgradcheck(
        lambda *x: ppo_loss(**given | dict(zip(LEARNT, x)), **COEFS).loss, learnt, fast_mode=True
    )
    found = {}
    given = {n: t if n == "mask" else t.nan_to_num() for n, t in batch(3, 6, torch.float32).items()}
    learnt = [given[name].requires_grad_() for name in LEARNT]
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            grads = torch.autograd.grad(ppo_loss(**given, **COEFS).loss, learnt, create_graph=True)
            found[backend] = torch.autograd.grad(sum(g.square().sum() for g in grads), learnt[:2])
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_no_gradient_for_what_is_given():
    given = batch(2, 4, torch.float32)
    constants = [n for n in given if n not in (*LEARNT, "mask")]
    for name in given:
        if name != "mask":
            given[name].requires_grad_()
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            loss = ppo_loss(**given, **COEFS).loss
        grads = torch.autograd.grad(loss, [given[n] for n in constants], allow_unused=True)
        assert grads == (None,) * len(constants)


def test_the_graph_may_be_used_twice_and_the_loss_scaled():
    given = batch(3, 40, torch.float32)
    given["logprobs"].requires_grad_()
    loss = ppo_loss(**given, **COEFS).loss
    first, second = (torch.autograd.grad(scale * loss, given["logprobs"], retain_graph=True)[0] for scale in (1, 4))
    torch.testing.assert_close(second, 4 * first)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_written_over_what_was_saved_are_those_of_a_graph_that_is_kept(aggregation):
    given = batch(9, 700, torch.float32)
    items = {"num_items": 70} if aggregation == "token-sum-norm" else {}
    wanted = [given[name].requires_grad_() for name in LEARNT]
    loss = ppo_loss(**given, **COEFS, **items, aggregation=aggregation).loss
    kept = torch.autograd.grad(loss, wanted, torch.tensor(0.3), retain_graph=True)
    again = torch.autograd.grad(loss, wanted, torch.tensor(0.3))
    for a, b in zip(kept, again):
        assert torch.equal(a, b)
    loss = ppo_loss(**given, **COEFS, **items, aggregation=aggregation).loss
    only = torch.autograd.grad(loss, wanted[2], torch.tensor(0.3))
    assert torch.equal(only[0], kept[2])


def test_a_gradient_may_be_changed_in_place_between_two_passes():
    given = batch(3, 40, torch.float32)
    wanted = [given[name].requires_grad_() for name in LEARNT]
    loss = ppo_loss(**given, **COEFS).loss
    loss.backward(retain_graph=True)
    first = [x.grad.clone() for x in wanted]
    for x in wanted:
        x.grad.zero_()
    loss.backward()
    for x, grad in zip(wanted, first):
        assert torch.equal(x.grad, grad)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_gradient_may_be_changed_in_place_while_another_is_used():
    given = batch(3, 40, torch.float32)
    wanted = [given[name].requires_grad_() for name in LEARNT]
    of_logprobs, of_values, _ = torch.autograd.grad(ppo_loss(**given, **COEFS).loss, wanted)
    scale = torch.ones((), requires_grad=True)
    loss = (scale * of_values).sum()
    of_logprobs.zero_()
    of_logprobs += scale
    (loss + of_logprobs.sum()).backward()
    torch.testing.assert_close(scale.grad, of_values.sum() + of_logprobs.numel())
    of_values.detach_()


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_each_gradient_has_memory_of_its_own_that_no_later_call_writes(factor):
    given = batch(3, 40, torch.float32)
    wanted = [given[name].requires_grad_() for name in LEARNT]
    first = torch.autograd.grad(ppo_loss(**given, **COEFS).loss * factor, wanted)
    assert len({g.untyped_storage().data_ptr() for g in first}) == 3
    kept = [g.clone() for g in first]
    torch.autograd.grad(ppo_loss(**given, **COEFS).loss * 3, wanted)
    for grad, before in zip(first, kept):
        assert torch.equal(grad, before)
        assert not grad.requires_grad


def test_a_batch_of_gradients():
    given = batch(3, 40, torch.float32)
    wanted = [given[name].requires_grad_() for name in LEARNT]
    scales = torch.tensor([1.0, 0.3])
    batched = torch.autograd.grad(ppo_loss(**given, **COEFS).loss, wanted, scales, is_grads_batched=True)
    for n, scale in enumerate(scales):
        for a, b in zip(batched, torch.autograd.grad(ppo_loss(**given, **COEFS).loss, wanted, scale)):
            torch.testing.assert_close(a[n], b)


def test_a_rollout_may_have_been_made_in_inference_mode():
    given = batch(3, 40, torch.float32)
    expected, grads = run(given, **COEFS)
    with torch.inference_mode():
        made = {name: t.clone() for name, t in given.items() if name not in LEARNT[:2]}
        items = made["mask"].sum()
    wanted = {name: given[name].requires_grad_() for name in LEARNT[:2]}
    for how in ({}, {"num_items": items}):
        loss = ppo_loss(**given | made | wanted, **COEFS, **how).loss
        torch.testing.assert_close(loss, expected.loss)
        for name, grad in zip(wanted, torch.autograd.grad(loss, list(wanted.values()))):
            torch.testing.assert_close(grad, grads[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_agrees(dtype, reentrant):
    given = given_without_nan(3, 8, dtype)

    def loss(*learnt):
        return ppo_loss(**given | dict(zip(LEARNT, learnt)), **COEFS).loss

    learnt = [given[name] for name in LEARNT]
    expected = torch.autograd.grad(loss(*learnt) * 0.3, learnt)
    for kept in (False, True):
        found = checkpoint(loss, *learnt, use_reentrant=reentrant) * 0.3
        found.backward(retain_graph=kept)
        torch.testing.assert_close([x.grad for x in learnt], list(expected))
        for x in learnt:
            x.grad = None
