"""Actor, critic, reference and reward model in one module, so that one engine runs, trains and shards them all.

Token tensors here are of the response alone, (B, T), beside whole rows of ids (B, P + T) whose first P are the prompt, padded on
the left: hidden state P - 1 + t predicts response token t, and the value there is that of the state before it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

import fastllm
from fastllm import rl
from fastllm.errors import ConfigError
from fastllm.train import heads, models
from fastllm.train.config import ModelOptions
from fastllm.train.heads import HeadInput, bare_model, score_head
from fastllm.train.online.options import OnlineOptions


class Opinions(NamedTuple):
    """What the models think of sampled responses: (B, T) each, scores (B,); None of a model that is not there."""

    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    scores: Tensor | None


class Models(nn.Module):
    """
    Args:
        actor: a causal LM of transformers, with LoRA adapters or without.
        critic, reward: sequence classifiers with one label; None for none.
        reference: a frozen copy of the actor; "adapters off": the actor without its adapters; None for none.
        temperature: of sampling, by which all logits are divided.
    """

    def __init__(self, actor: Any, critic: Any, reference: Any, reward: Any, temperature: float) -> None:
        super().__init__()
        self.actor, self.critic, self.reward = actor, critic, reward
        self.reference = reference if isinstance(reference, nn.Module) else None
        self.without_adapters = reference == "adapters off"
        self.temperature = temperature
        self.config = bare_model(actor).config  # which transformers' DeepSpeed settings are completed by
        for frozen in (self.reference, self.reward):
            if frozen is not None:
                frozen.requires_grad_(False)

    def forward(self, what: str, *args: Any, **kwargs: Any) -> Any:
        """`judge`, `loss`, ...: engines run, wrap and hook nothing but a module's forward."""
        return getattr(self, what)(*args, **kwargs)

    # ---- without gradients -------------------------------------------------------------------------------------------

    def judge(self, ids: Tensor, attention: Tensor, mask: Tensor) -> Opinions:
        """What every model thinks of responses. ids, attention (B, P + T), mask (B, T) bool: the response's tokens."""
        logprobs, ref_logprobs = self.logprobs(self.actor, ids, attention, mask), None
        if self.reference is not None:
            ref_logprobs = self.logprobs(self.reference, ids, attention, mask)
        elif self.without_adapters:
            with self.actor.disable_adapter():
                ref_logprobs = self.logprobs(self.actor, ids, attention, mask)
        values = None if self.critic is None else self.values(ids, attention, mask)
        return Opinions(logprobs, ref_logprobs, values, self.score(ids, attention))

    def score(self, ids: Tensor, attention: Tensor) -> Tensor | None:
        """(B,) the reward model's, read where transformers reads it: at each row's last token that is not the padding token, also
        where a response ends with that token."""
        if self.reward is None:
            return None
        every = score_head(self.reward)(hidden_states(self.reward, ids, attention)).squeeze(-1)
        pad = bare_model(self.reward).config.get_text_config().pad_token_id
        return rl.sequence_scores(every, attention.bool() if pad is None else attention.bool() & (ids != pad))

    # ---- with gradients ----------------------------------------------------------------------------------------------

    def logprobs(self, model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        """(B, T) of the response tokens."""
        found = head_input(model, ids, attention, mask)
        tokens = ids[:, -mask.shape[1] :]
        return rl.linear_logprobs(found.hidden, found.head, tokens, mask, temperature=self.temperature, **found.options)

    def values(self, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        """(B, T), of the states before the response tokens."""
        hidden = _of_response(hidden_states(self.critic, ids, attention), mask)
        return score_head(self.critic)(hidden).squeeze(-1).float()

    def policy_loss(
        self, ids: Tensor, attention: Tensor, mask: Tensor, old_logprobs: Tensor, advantages: Tensor, *,
        texts: Any = None, ptx_coef: float = 0.0, **options: Any,
    ) -> rl.PPOLoss:  # fmt: skip
        """``rl.linear_ppo_loss`` of responses, with the critic's values in it.

        texts: arguments of `text_loss`, which ptx_coef weighs. It is added here because engines want one forward pass for each
            backward pass.
        """
        if self.critic is not None:
            options["values"] = self.values(ids, attention, mask)
        found = head_input(self.actor, ids, attention, mask)
        loss, stats = rl.linear_ppo_loss(
            found.hidden, found.head, ids[:, -mask.shape[1] :], old_logprobs, advantages, mask, temperature=self.temperature,
            **found.options, **options,
        )  # fmt: skip
        if texts is not None:
            ptx = self.text_loss(*texts)
            loss, stats = loss + ptx_coef * ptx, stats | {"ptx_loss": ptx.detach()}
        return rl.PPOLoss(loss, stats)

    def value_loss(
        self,
        ids: Tensor,
        attention: Tensor,
        mask: Tensor,
        returns: Tensor,
        old_values: Tensor,
        num_items: Tensor,
        clip: Any,
    ) -> Tensor:
        """0.5 (V - R)² over num_items, clipped as in PPO: for a critic that warms up, while the actor waits."""
        values = self.values(ids, attention, mask)
        zeros = torch.zeros_like(values)
        loss = rl.ppo_loss(
            zeros, zeros, zeros, mask, values=values, returns=returns, old_values=old_values, value_clip=clip,
            value_coef=1.0, num_items=num_items,
        ).loss  # fmt: skip
        # DistributedDataParallel waits for a gradient of every trained parameter.
        whole = [p for p in self.actor.parameters() if p.requires_grad and not hasattr(p, "ds_id")]
        return loss + 0.0 * torch.stack([p.sum().float() for p in whole]).sum() if whole else loss

    def text_loss(self, ids: Tensor, attention: Tensor, mask: Tensor, num_items: Tensor | float) -> Tensor:
        """Cross entropy over num_items of the tokens that `mask` (B, T), of ids' last T, names; at temperature 1."""
        found = head_input(self.actor, ids, attention, mask)
        logprobs = rl.linear_logprobs(found.hidden, found.head, ids[:, -mask.shape[1] :], mask, **found.options)
        return -logprobs.sum() / num_items


# ---- parts of a model --------------------------------------------------------------------------------------------------


def head_input(model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> HeadInput:
    """What reaches the LM head at the states (B, T) before the response tokens."""
    found = heads.hidden_states(model, model, **_inputs(bare_model(model), ids, attention))
    return replace(found, hidden=_of_response(found.hidden, mask))


def hidden_states(classifier: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """(B, L, C) of a classifier's last layer, which its score head reads."""
    body = bare_model(classifier).base_model
    return body(**_inputs(body, ids, attention), use_cache=False).last_hidden_state


def _inputs(model: Any, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
    """With positions that count from each row's first token that is not padding, where a model takes them."""
    accepted = inspect.signature(type(model).forward).parameters
    if "position_ids" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return {"input_ids": ids, "attention_mask": attention}
    positions = (attention.long().cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": attention, "position_ids": positions}


def _of_response(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[:, -mask.shape[1] - 1 : -1]


# ---- loading -----------------------------------------------------------------------------------------------------------


def load(
    options: ModelOptions, tokenizer: Any, max_length: int, asked: OnlineOptions, *, with_critic: bool, with_reference: bool,
    checkpointing: dict[str, Any] | None,
) -> Models:  # fmt: skip
    """All models that a run needs, without dropout: the policy that is trained is then the one that sampled.

    Args:
        asked: settled.
        checkpointing: arguments of gradient_checkpointing_enable for what is trained, or None.

    Raises:
        ConfigError: a model that is not there, or does not fit.
    """
    actor = models.load_model(options, tokenizer, max_length, stage="ppo")
    reference: Any = None
    if with_reference and options.lora:
        reference = "adapters off"
    elif with_reference:
        reference = models.load_model(options, tokenizer, max_length, stage="ppo", reference=True)
        if options.from_scratch:
            reference.load_state_dict(actor.state_dict())
    judge = asked.reward if asked.reward and not is_function(asked.reward) else None
    reward = _classifier(judge, "reward", options, tokenizer) if judge else None
    critic = None
    if with_critic:
        begun = asked.critic or judge or options.model
        critic = _classifier(begun, "critic", options, tokenizer, lora=options.lora)
        if checkpointing is not None:
            critic.gradient_checkpointing_enable(**checkpointing)
    if checkpointing is not None:
        actor.gradient_checkpointing_enable(**checkpointing)
    whole = Models(actor, critic, reference, reward, asked.temperature)
    _without_dropout(whole)
    return whole


def _without_dropout(models: nn.Module) -> None:
    """Of modules, and of the rates that others keep as numbers: Bloom's hidden_dropout, OPT's dropout and layerdrop, ..."""
    for module in models.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def is_function(reward: str) -> bool:
    """module:function, and not a path."""
    return ":" in reward and not Path(reward).exists()


def _classifier(name: str, key: str, options: ModelOptions, tokenizer: Any, lora: dict[str, Any] | None = None) -> Any:
    models._exists(name, key)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # of many libraries
        raise ConfigError(f"{key}: cannot load {name}: {models._first_line(error)}") from error
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"{key}: {name} has {vocabulary} tokens and the model's tokenizer {len(tokenizer)}: they must share one"
        )
    _check_tokenizer(name, key, tokenizer)
    trained = any("SequenceClassification" in a for a in config.architectures or [])
    if key == "reward" and not trained:
        raise ConfigError(
            f"reward: {name} is a {(config.architectures or ['model'])[0]}, not a reward model with one score"
        )
    kind, dtype = transformers.AutoModelForSequenceClassification, getattr(torch, options.dtype)
    try:
        if Path(name).suffix == ".json":
            model = kind.from_config(transformers.AutoConfig.from_pretrained(name, num_labels=1), dtype=dtype)
        else:
            model = models.load_whole(kind, name, new_head=not trained, num_labels=1, dtype=dtype)
    except Exception as error:
        raise ConfigError(f"{key}: {models._first_line(error)}") from error
    head = score_head(model)
    if not trained:  # values begin at 0
        with _gathered(list(head.parameters())), torch.no_grad():
            for parameter in head.parameters():
                parameter.zero_()
    if lora:
        model = models._with_adapters(model, lora, "SEQ_CLS")
    if options.patch is not False:
        fastllm.patch(model, "auto" if options.patch is True else options.patch, exclude=("loss",))
    return model


def _check_tokenizer(name: str, key: str, tokenizer: Any) -> None:
    """A model that was trained with another tokenizer reads other texts out of the same ids."""
    try:
        other = transformers.AutoTokenizer.from_pretrained(name)
    except Exception:  # it has none of its own
        return
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{key}: {name} has a tokenizer of its own; it must have been trained with the model's")


@contextlib.contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    if any(hasattr(p, "ds_id") for p in parameters):
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            yield
    else:
        yield
