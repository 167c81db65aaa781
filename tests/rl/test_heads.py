"""The LM head given as a module: plain, tied, with adapters, with hooks, patched."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastllm.ops import _linear_rows
from fastllm.rl import linear_dpo_loss, linear_ppo_loss, linear_sequence_logprobs, ppo_loss

peft = pytest.importorskip("peft", reason="the claims on LoRA heads need PEFT; the dev extra installs it")
LEVELS = ("token", "sequence")
CHANNELS, CLASSES = 16, 61


class Model(nn.Module):
    def __init__(self, tied=False, bias=False):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, CHANNELS)
        self.body = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return torch.tanh(self.body(self.embedding(ids)))


def data():
    ids = torch.randint(CLASSES, (3, 6))
    mask = torch.rand(3, 5) < 0.8
    mask[0] = True
    return ids, mask, -3 + torch.randn(3, 5), torch.randn(3, 5)


def adapted(bias=False, **config):
    config = peft.LoraConfig(target_modules=["head"], r=4, lora_alpha=6, **config)
    model = peft.get_peft_model(Model(bias=bias), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # PEFT starts with a delta of 0
            nn.init.normal_(parameter, std=0.3)
    return model


def gradients(loss, model):
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_as_unfused(model, head, level="token", seed=None):
    """Loss and gradients of every parameter by `head` given as a module, against those of the logits that it computes."""
    ids, mask, old, advantages = data()
    if seed is not None:  # the random numbers of a dropout are drawn for valid tokens alone: let them be all
        mask = torch.ones_like(mask)
    options = {"level": level, "entropy_coef": 0.05}
    found = []
    for fused in (True, False):
        if seed is not None:
            torch.manual_seed(seed)
        hidden = model(ids)[:, :-1]
        if fused:
            loss = linear_ppo_loss(hidden, head, ids[:, 1:], old, advantages, mask, **options).loss
        else:
            logp = head(hidden).float().log_softmax(-1)
            chosen = logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
            loss = ppo_loss(chosen, old, advantages, mask, entropy=-(logp.exp() * logp).sum(-1), **options).loss
        found.append((loss.detach(), gradients(loss, model)))
    assert found[0][1]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    return found[0][1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_and_a_tied_head(level, bias, tied):
    model = Model(tied, bias)
    found = assert_as_unfused(model, model.head, level)
    assert ("head.weight" in found) == (not tied)
    assert ("head.bias" in found) == bias


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("lora_bias", [False, True])
def test_adapters_of_a_lora_head_get_the_gradients_of_the_unfused_one(monkeypatch, level, lora_bias):
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": CLASSES * 4 * 4})
    monkeypatch.setattr(_linear_rows, "CPU_CLASSES", 20)
    model = adapted(lora_bias=lora_bias, bias=lora_bias)
    found = assert_as_unfused(model, model.base_model.model.head, level)
    assert sum("lora" in name for name in found) == 2 + lora_bias
    assert not any("base_layer" in name for name in found)


def test_no_gradient_of_the_frozen_weight_is_computed(monkeypatch):
    asked = []
    sweep = _linear_rows.sweep
    monkeypatch.setattr(_linear_rows, "sweep", lambda *a, **k: (asked.append(tuple(k["wanted"])), sweep(*a, **k))[1])
    model = adapted()
    ids, mask, old, advantages = data()
    hidden = model(ids)[:, :-1]
    linear_ppo_loss(hidden, model.base_model.model.head, ids[:, 1:], old, advantages, mask)
    assert asked == [(False, False, False, True, True)]


@pytest.mark.parametrize("level", LEVELS)
def test_dropout_of_an_adapter_is_that_of_the_module(level):
    model = adapted(lora_dropout=0.4).train()
    assert_as_unfused(model, model.base_model.model.head, level, seed=3)


def test_several_adapters_disabled_adapters_and_merged_ones():
    model = adapted()
    model.add_adapter("second", peft.LoraConfig(target_modules=["head"], r=2, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    head = model.base_model.model.head
    found = assert_as_unfused(model, head)
    assert sum("lora" in name for name in found) == 4
    embeddings = [p.requires_grad_() for n, p in model.named_parameters() if "embedding" in n]
    with model.disable_adapter():
        assert not any("lora" in name for name in assert_as_unfused(model, head))
    model.merge_adapter()
    assert not any("lora" in name for name in assert_as_unfused(model, head))
    assert embeddings


def test_a_head_that_is_trained_whole_beside_adapters():
    config = peft.LoraConfig(target_modules=["body"], modules_to_save=["head"])
    model = peft.get_peft_model(Model(), config)
    head = model.base_model.model.head
    assert any("modules_to_save" in name for name in assert_as_unfused(model, head))
    with model.disable_adapter(), torch.no_grad():
        ids, mask, *_ = data()
        hidden = model(ids)[:, :-1]
        logp = head(hidden).log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        sums, _ = linear_sequence_logprobs(hidden, head, ids[:, 1:], mask)
    torch.testing.assert_close(sums, logp.where(mask, 0.0).sum(-1))


def test_a_lora_head_in_bf16_with_adapters_in_fp32():
    model = adapted()
    model.base_model.model.to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    exact = copy.deepcopy(model).double()
    head = model.base_model.model.head
    ids, mask, old, advantages = data()
    with torch.no_grad():
        z = exact.base_model.model.head(exact(ids)[:, :-1])
        old = z.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1).float() + 0.05

    def run(model, fused):
        hidden, head = model(ids)[:, :-1], model.base_model.model.head
        if fused:
            return gradients(linear_ppo_loss(hidden, head, ids[:, 1:], old, advantages, mask).loss, model)
        logp = head(hidden).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
        chosen = logp.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return gradients(ppo_loss(chosen, old, advantages, mask).loss, model)

    ours, eager, reference = run(model, True), run(model, False), run(exact, False)
    assert ours.keys() == reference.keys() == eager.keys()
    for name, expected in reference.items():
        error, allowed = ((g[name].double() - expected).abs().max() for g in (ours, eager))
        assert ours[name].dtype == torch.float32
        assert error <= 2 * allowed + 1e-4 * expected.abs().max().clamp(min=1)
    assert head.base_layer.weight.grad is None


def test_second_derivatives_and_compilation_see_the_adapters():
    model = adapted()
    ids, mask, old, advantages = data()
    lora = [p for n, p in model.named_parameters() if "lora" in n]
    for p in model.parameters():
        p.requires_grad_(True)

    def fused(hidden):
        return linear_ppo_loss(hidden, model.base_model.model.head, ids[:, 1:], old, advantages, mask).loss

    def unfused(hidden):
        chosen = model.base_model.model.head(hidden).log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        return ppo_loss(chosen, old, advantages, mask).loss

    found = []
    for loss in (fused, unfused):
        grad = torch.autograd.grad(loss(model(ids)[:, :-1]), lora, create_graph=True)
        found.append((grad, torch.autograd.grad(sum(g.square().sum() for g in grad), lora)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(fused, backend="aot_eager")
    grads = [torch.autograd.grad(f(model(ids)[:, :-1]), lora) for f in (compiled, unfused)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_hooks_of_the_head_run_around_the_loss_and_its_backward_pass():
    """As DeepSpeed's ZeRO-3 gathers: before the forward pass and before the backward pass, released after the first."""
    for level in LEVELS:
        model = Model()
        whole = model.head.weight.data.clone()
        seen = []

        def gather(*_):
            model.head.weight.data = whole  # noqa: B023
            seen.append("gathered")  # noqa: B023

        def release(module, args, output):
            module.weight.data = whole.new_empty(0)  # noqa: B023

        class Regather(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.detach()

            @staticmethod
            def backward(ctx, grad):
                gather()
                return grad

        def again(module, args, output):
            return tuple(Regather.apply(o) for o in output) if isinstance(output, tuple) else Regather.apply(output)

        plain = copy.deepcopy(model)
        for add, hook in (
            (model.head.register_forward_pre_hook, gather), (model.head.register_forward_hook, again),
            (model.head.register_forward_hook, release),
        ):  # fmt: skip
            add(hook)
        release(model.head, None, None)
        ids, mask, old, advantages = data()
        found = []
        for m in (model, plain):
            loss = linear_ppo_loss(m(ids)[:, :-1], m.head, ids[:, 1:], old, advantages, mask, level=level).loss
            assert m is plain or model.head.weight.numel() == 0
            found.append(gradients(loss, m))
        assert (
            seen == ["gathered"] * 2
        )  # the weight is not needed twice where gradients are found at once, but gathered as ever
        assert "forward" not in model.head.__dict__
        torch.testing.assert_close(*found)


def test_a_patched_model_s_head_and_a_preference_loss():
    transformers = pytest.importorskip("transformers")
    import fastllm

    config = transformers.LlamaConfig(
        vocab_size=CLASSES, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    ids, mask = torch.randint(CLASSES, (4, 6)), torch.rand(4, 5) < 0.8
    logp = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    sums = logp.where(mask, 0.0).sum(-1)
    reference = torch.zeros(2)
    expected = -F.logsigmoid(0.1 * (sums[:2] - sums[2:])).mean()
    expected_grads = gradients(expected, model)
    fastllm.patch(model)
    hidden = model.model(ids).last_hidden_state[:, :-1]
    loss = linear_dpo_loss(hidden, model.lm_head, ids[:, 1:], mask, reference, reference).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(loss, model), expected_grads, atol=1e-5, rtol=1e-4)


def test_heads_that_are_not_understood_are_refused():
    ids, mask, old, advantages = data()
    hidden = torch.zeros(3, 5, CHANNELS)

    def loss(head, **options):
        return linear_ppo_loss(hidden, head, ids[:, 1:], old, advantages, mask, **options)

    with pytest.raises(ValueError, match=r"weight must be a tensor .*got a Sequential: give its effective weight"):
        loss(nn.Sequential(nn.Linear(CHANNELS, CLASSES)))
    model = nn.Sequential()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"got a Sequential: give its head, model.get_output_embeddings\(\)"):
        loss(model)
    with pytest.raises(ValueError, match="adapter 'default' of variant Dora"):
        loss(adapted(use_dora=True).base_model.model.head)
    with pytest.raises(ValueError, match="bias must be None where weight is a module"):
        loss(nn.Linear(CHANNELS, CLASSES), bias=torch.zeros(CLASSES))
    head = nn.Linear(CHANNELS, CLASSES)
    head.forward = lambda x: x
    with pytest.raises(ValueError, match="one whose forward was replaced by other code"):
        loss(head)
    partitioned = nn.Parameter(torch.empty(0))
    partitioned.ds_id = 1
    with pytest.raises(ValueError, match="weight is partitioned by ZeRO-3: give the head as a module"):
        loss(partitioned)
