"""Run by a launcher: trains a tiny Llama unpatched, patched before and patched after deepspeed.initialize.

Prints one JSON line per rank: {"stage": ..., "losses": {"plain": [...], "before": [...], "after": [...]}, "counts": ...}.
"""

import json
import sys
import tempfile
from pathlib import Path

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastllm
from tests.ranks import compile_nothing

CONFIG = LlamaConfig(
    vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_implementation="eager",
)  # fmt: skip


def train(stage: int, when: str, start: Path) -> tuple[list[float], dict[str, int]]:
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    model = LlamaForCausalLM(CONFIG)
    model.load_state_dict(torch.load(start))
    counts: dict[str, int] = {}
    if when == "before":
        counts = fastllm.patch(model).counts
    engine, *_ = deepspeed.initialize(model=model, config=settings, model_parameters=model.parameters())
    if when == "after":
        counts = fastllm.patch(engine.module).counts
    generator = torch.Generator().manual_seed(engine.global_rank)
    losses = []
    for _ in range(4):
        ids = torch.randint(0, CONFIG.vocab_size, (2, 16), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
        loss = engine(input_ids=ids, labels=labels).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, counts


if __name__ == "__main__":
    compile_nothing()
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    start = Path(tempfile.gettempdir()) / f"fastllm-start-{rank}-{torch.distributed.get_world_size()}.pt"
    torch.save(LlamaForCausalLM(CONFIG).state_dict(), start)
    for stage in (2, 3):
        found = {when: train(stage, when, start) for when in ("plain", "before", "after")}
        report = {
            "stage": stage,
            "rank": rank,
            "losses": {when: losses for when, (losses, _) in found.items()},
            "counts": {when: counts for when, (_, counts) in found.items()},
        }
        sys.stdout.write("RESULT " + json.dumps(report) + "\n")
        sys.stdout.flush()
    start.unlink()
