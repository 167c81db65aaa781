"""Run by a launcher: trains a policy whose head's weights are partitioned, by logits and by linear_ppo_loss.

Prints one line per rank and case: RESULT {"case": ..., "logits": [losses], "linear": [losses]}.
"""

import json
import sys

import deepspeed
import peft
import torch
from torch import nn

from fastllm import rl
from tests.ranks import compile_nothing

CLASSES, CHANNELS = 61, 32


class Policy(nn.Module):
    def __init__(self, way: str, level: str, lora: bool) -> None:
        super().__init__()
        self.way, self.level = way, level
        self.embedding = nn.Embedding(CLASSES, CHANNELS)
        self.body = nn.Linear(CHANNELS, CHANNELS)
        self.head = nn.Linear(CHANNELS, CLASSES, bias=True)
        if lora:
            torch.manual_seed(2)
            config = peft.LoraConfig(target_modules=["head"], r=4, init_lora_weights=False)
            peft.inject_adapter_in_model(config, self)
            self.embedding.requires_grad_(True)
            self.body.requires_grad_(True)

    def forward(self, ids, old, advantages, mask):
        hidden = torch.tanh(self.body(self.embedding(ids)))[:, :-1]
        tokens = ids[:, 1:]
        if self.way == "linear":
            return rl.linear_ppo_loss(hidden, self.head, tokens, old, advantages, mask, level=self.level).loss
        logp = self.head(hidden).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return rl.ppo_loss(logp, old, advantages, mask, level=self.level).loss


def train(way: str, level: str, lora: bool) -> list[float]:
    torch.manual_seed(1)
    policy = Policy(way, level, lora)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {  # every weight is let go after each use
            "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }  # fmt: skip
    learnt = [p for p in policy.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=policy, config=settings, model_parameters=learnt)
    generator = torch.Generator().manual_seed(engine.global_rank)
    losses = []
    for _ in range(3):
        ids = torch.randint(0, CLASSES, (2, 9), generator=generator)
        old, advantages = (torch.randn(2, 8, generator=generator) for _ in range(2))
        mask = torch.rand(2, 8, generator=generator) < 0.8
        loss = engine(ids, old - 4, advantages, mask)
        assert policy.body.weight.numel() == 0, "the test's own premise: weights are partitioned between uses"
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    compile_nothing()
    deepspeed.init_distributed("gloo")
    # gradients that are found at once, and in a backward pass of their own
    for level, lora in (("token", False), ("sequence", True)):
        found = {way: train(way, level, lora) for way in ("logits", "linear")}
        case = {"case": f"{level} {'lora' if lora else 'plain'}", "rank": torch.distributed.get_rank(), **found}
        sys.stdout.write("RESULT " + json.dumps(case) + "\n")
        sys.stdout.flush()
