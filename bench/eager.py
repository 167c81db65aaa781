"""The peers in plain PyTorch: what a Transformers model or a training script does without fastllm, step by step and
dtype by dtype, restated so that a benchmark needs torch alone. torch.compile is given the same functions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As LlamaRMSNorm: normalised in fp32, rounded, then scaled."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def rms_norm_into(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return out.copy_(rms_norm(x, weight))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As apply_rotary_pos_emb of Llama, in the dtype of its inputs."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def rope(q: Tensor, k: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """As Llama's rotary module, in fp32 at least, and its rotation."""
    angles = position_ids.to(inv_freq.dtype).unsqueeze(-1) * inv_freq
    angles = torch.cat((angles, angles), -1)
    return apply_rope(q, k, angles.cos().to(q.dtype), angles.sin().to(q.dtype))


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As ForCausalLMLoss, which takes the logits to fp32 first."""
    return F.cross_entropy(logits.float(), target)


def token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(logits.float(), target)


def _token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of its distribution."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.T, target)


def linear_token_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden @ weight.T, target)


def gae(rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """As the trainers of RLHF libraries have it: a loop in Python from the last token to the first."""
    tokens = rewards.shape[1]
    advantage: Tensor | float = 0.0
    found = []
    for t in reversed(range(tokens)):
        following = values[:, t + 1] if t + 1 < tokens else 0.0
        advantage = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


PPO_STATS = (
    "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "approx_kl_k3", "clip_fraction", "value_clip_fraction",
    "ratio_mean", "ratio_max", "advantage_mean", "returns_mean", "value_mean", "explained_variance",
)  # fmt: skip


def ppo_loss(
    logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor,
    entropy: Tensor, mask: Tensor, value_coef: float, entropy_coef: float, kl_coef: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As a PPO trainer composes it: policy and value loss clipped at 0.2, entropy, KL (k3) to the reference, averaged over
    the valid tokens; and what it logs, PPO_STATS."""
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count

    log_ratio = torch.clamp(logprobs - old, -20.0, 20.0)
    ratio = torch.exp(log_ratio)
    free, cut = -advantages * ratio, -advantages * torch.clamp(ratio, 0.8, 1.2)
    policy = mean(torch.maximum(free, cut))
    near = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    squares, squares_near = (values - returns).square(), (near - returns).square()
    value = 0.5 * mean(torch.maximum(squares, squares_near))
    apart = ref - logprobs
    kl = mean(torch.exp(apart) - apart - 1.0)
    entropies = mean(entropy)
    loss = policy + value_coef * value - entropy_coef * entropies + kl_coef * kl
    with torch.no_grad():
        error, centre = returns - values, mean(returns)
        stats = (
            policy, value, entropies, kl, mean(-log_ratio), mean(ratio - 1.0 - log_ratio), mean((cut > free).to(ratio.dtype)),
            mean((squares_near > squares).to(ratio.dtype)), mean(ratio), ratio.masked_fill(~mask, 0.0).max(), mean(advantages),
            centre, mean(values), 1 - mean((error - mean(error)).square()) / mean((returns - centre).square()),
        )  # fmt: skip
    return loss, *(x.detach() for x in stats)


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """As a GRPO trainer: logits, taken to fp32, log-probabilities of the tokens, the loss clipped at 0.2."""
    return _clipped_loss((hidden @ weight.T).float(), tokens, old, advantages, mask)


def exact_linear_ppo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    return _clipped_loss(hidden @ weight.T, tokens, old, advantages, mask)


def _clipped_loss(logits: Tensor, tokens: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    logprobs = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    ratio, a = torch.exp(logprobs - old), advantages.unsqueeze(-1)
    return (torch.maximum(-a * ratio, -a * torch.clamp(ratio, 0.8, 1.2)) * mask).sum() / mask.sum()


def linear_dpo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    """As a DPO trainer: logits of policy and reference, taken to fp32, summed log-probabilities of the responses, sigmoid loss."""
    with torch.no_grad():
        reference = _sequence_logprobs((ref_hidden @ ref_weight.T).float(), tokens, mask)
    return _dpo_loss(_sequence_logprobs((hidden @ weight.T).float(), tokens, mask), reference)


def exact_linear_dpo_loss(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    reference = _sequence_logprobs(ref_hidden @ ref_weight.T, tokens, mask)
    return _dpo_loss(_sequence_logprobs(hidden @ weight.T, tokens, mask), reference.detach())


def _sequence_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return (logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask).sum(-1)


def _dpo_loss(logps: Tensor, reference: Tensor) -> Tensor:
    chosen, rejected = (logps - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int) -> Tensor:
    """What a model does about a window: a mask of all pairs."""
    i, j = torch.arange(q.shape[2], device=q.device).unsqueeze(1), torch.arange(k.shape[2], device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & ((i - j < window) | (j < sinks)))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor) -> Tensor:
    """Causal attention of one document after the other."""
    found = []
    for a, b in itertools.pairwise(bounds.tolist()):
        document = (t[a:b].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        found.append(F.scaled_dot_product_attention(*document, is_causal=True)[0].transpose(0, 1))
    return torch.cat(found)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Over full caches."""
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def dilated_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[int], rates: Sequence[int]) -> Tensor:
    """LongNet from its definition: of each segment the tokens a head keeps, attention among them, a mix by their lse."""
    batch, heads, length, _ = q.shape
    outs, lses = [], []
    for segment, rate in zip(segments, rates):
        segment = min(segment, length)
        out = torch.zeros_like(q)
        lse = torch.full(
            (batch, heads, length), float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device
        )
        for start in range(0, length, segment):
            for offset in range(min(rate, heads)):
                kept = (slice(None), slice(offset, None, rate), slice(start + offset, start + segment, rate))
                scores = q[kept] @ k[kept].transpose(-1, -2) / q.shape[-1] ** 0.5
                hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
                scores = scores.to(lse.dtype).masked_fill(hidden, float("-inf"))
                out[kept] = torch.softmax(scores, -1).to(v.dtype) @ v[kept]
                lse[kept] = torch.logsumexp(scores, -1)
        outs.append(out)
        lses.append(lse)
    shares = torch.softmax(torch.stack(lses), 0).nan_to_num()
    return sum(o * share.unsqueeze(-1).to(o.dtype) for o, share in zip(outs, shares))  # type: ignore[return-value]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, sinks: int = 0) -> Tensor:
    """Causal attention, 512 queries at a time over the keys that they see."""
    found = []
    for start in range(0, q.shape[2], 512):
        i = torch.arange(start, min(start + 512, q.shape[2]), device=q.device)
        j = torch.arange(int(i[-1]) + 1, device=q.device)
        if window is not None:
            j = j[(j < sinks) | (j > start - window)]
        scores = q[:, :, i] @ k[:, :, j].transpose(-1, -2) / q.shape[-1] ** 0.5
        hidden = j > i.unsqueeze(1)
        if window is not None:
            hidden = hidden | ((i.unsqueeze(1) - j >= window) & (j >= sinks))
        found.append(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1) @ v[:, :, j])
    return torch.cat(found, 2)


def exact_rms_norm(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def exact_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return exact_rms_norm(x + residual, weight), x + residual


def exact_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, target)


def exact_token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(logits, target)


def exact_linear_token_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(hidden @ weight.T, target)
