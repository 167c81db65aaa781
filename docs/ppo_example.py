"""Trains a tiny model by PPO on a reward that a program checks: the digits of the prompt, sorted.

    python docs/ppo_example.py [SECONDS]

SECONDS: how long to train (default 100; two cores are enough). Plain PyTorch and fastllm, no trainer, no other library. The
policy starts from random weights, so a reward of 0.1 is chance and 1 is every digit in its place.
"""

import math
import sys
import time

import torch
from torch import nn

from fastllm import ops, rl

DIGITS, SEPARATOR, VOCABULARY = 10, 10, 11
LENGTH = 3  # of the prompt and of the response
PROMPTS, GROUP, EPOCHS, MINI_BATCHES = 64, 4, 2, 2


class Policy(nn.Module):
    """A small causal transformer with a head for tokens and a head for values."""

    def __init__(self, channels: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, channels)
        self.place = nn.Embedding(2 * LENGTH + 1, channels)
        layer = nn.TransformerEncoderLayer(
            channels, heads, 4 * channels, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(channels), enable_nested_tensor=False)
        self.head = nn.Linear(channels, VOCABULARY, bias=False)
        self.value = nn.Linear(channels, 1)

    def forward(self, tokens):
        """The hidden state of every token (B, T, C)."""
        length = tokens.shape[1]
        hidden = self.token(tokens) + self.place.weight[:length]
        return self.layers(hidden, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True)

    @torch.no_grad()
    def generate(self, tokens):
        for _ in range(LENGTH):
            probabilities = self.head(self(tokens)[:, -1]).softmax(-1)
            tokens = torch.cat((tokens, torch.multinomial(probabilities, 1)), -1)
        return tokens


def check(tokens):
    """(B,) share of digits that are in their place."""
    prompt, response = tokens[:, :LENGTH], tokens[:, LENGTH + 1 :]
    return (response == prompt.sort(-1).values).float().mean(-1)


def train(seconds: float, batches: float = math.inf) -> list[float]:
    """The mean reward of each batch of responses."""
    torch.manual_seed(0)
    policy = Policy()
    reference = Policy().requires_grad_(False)
    reference.load_state_dict(policy.state_dict())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    kl = rl.AdaptiveKL(init=0.002, target=20.0, horizon=20000)
    answer = slice(LENGTH, 2 * LENGTH)  # hidden states that predict the response
    history = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds and len(history) < batches:
        # Rollout: sample, score, and remember what the losses need of the policy that sampled.
        prompts = torch.randint(DIGITS, (PROMPTS * GROUP, LENGTH))
        tokens = policy.generate(nn.functional.pad(prompts, (0, 1), value=SEPARATOR))
        response = tokens[:, LENGTH + 1 :]
        mask = torch.ones_like(response, dtype=torch.bool)  # with an end token: False after it
        with torch.no_grad():
            hidden = policy(tokens)[:, answer]
            old_logprobs = ops.linear_token_logprobs(hidden, policy.head.weight, response)
            old_values = policy.value(hidden).squeeze(-1)
            ref_logprobs = ops.linear_token_logprobs(reference(tokens)[:, answer], reference.head.weight, response)
        scores = check(tokens)
        rewards, mean_kl = rl.token_rewards(scores, old_logprobs, ref_logprobs, mask, kl_coef=kl.value)
        kl.update(mean_kl * LENGTH, len(scores))
        advantages, returns = ops.gae(rewards, old_values, gamma=1.0, lam=0.95, mask=mask)
        advantages = rl.whiten(advantages, mask)

        for _ in range(EPOCHS):
            for rows in torch.randperm(len(tokens)).chunk(MINI_BATCHES):
                hidden = policy(tokens[rows])[:, answer]
                loss, stats = rl.linear_ppo_loss(
                    hidden, policy.head.weight, response[rows], old_logprobs[rows], advantages[rows], mask[rows],
                    values=policy.value(hidden).squeeze(-1), old_values=old_values[rows], returns=returns[rows],
                    value_coef=0.5, entropy_coef=0.01,
                )  # fmt: skip
                if rl.should_stop(stats["approx_kl"], 0.05):
                    break
                loss.backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        history.append(scores.mean().item())
        if len(history) % 50 == 1:
            line = ", ".join(f"{name} {stats[name]:.3f}" for name in ("entropy", "approx_kl", "explained_variance"))
            print(f"batch {len(history)}: reward {history[-1]:.3f}, KL {mean_kl * LENGTH:.2f}, {line}", flush=True)
    return history


if __name__ == "__main__":
    history = train(float(sys.argv[1]) if len(sys.argv) > 1 else 100.0)
    first, last = (sum(part) / len(part) for part in (history[:5], history[-5:]))
    print(f"{len(history)} batches: reward {first:.3f} at first, {last:.3f} at last")
