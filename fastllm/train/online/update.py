"""Learning from an iteration's responses: epochs of mini-batches, until the policy has moved far enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm import rl
from fastllm.train import together
from fastllm.train.online.engines import Plain, Zero
from fastllm.train.online.experience import Experience
from fastllm.train.online.options import OnlineOptions
from fastllm.train.online.work import Work

# Statistics that are sums over micro-batches and processes, because num_items is of the whole mini-batch.
_SUMS = ("policy_loss", "value_loss", "entropy", "kl", "ptx_loss")
Texts = Callable[[], tuple[Tensor, Tensor, Tensor]]  # ids, attention and mask of a micro-batch of texts


def update(
    engine: Plain | Zero, experience: Experience, options: OnlineOptions, micro_batch: int, work: Work, *, warming: bool,
    texts: Texts | None,
) -> dict[str, float]:  # fmt: skip
    """Trains on `experience`; means of the losses' statistics, `updates` made and whether it `stopped` early.

    Args:
        micro_batch: responses at once; engine.accumulation of them are a mini-batch, an update.
        work: counts the FLOPs.
        warming: train the critic alone.
        texts: of stage ppo's pretraining loss.
    """
    engine.models.train()
    rows, stats = experience.rollout, _Stats()
    for _ in range(options.ppo_epochs):
        for order in torch.randperm(len(rows)).split(micro_batch * engine.accumulation):
            mini, lengths = order.to(rows.ids.device), [rows.lengths[n] for n in order.tolist()]
            items = engine.sum(_items(rows.mask[mini], options))
            mixed = [texts() for _ in range(engine.accumulation)] if texts and not warming else []
            text_items = engine.sum(sum(mask.sum() for *_, mask in mixed)) if mixed else None  # type: ignore[arg-type]
            read = [attention.sum(-1) for _, attention, _ in mixed]
            for n, index in enumerate(mini.split(micro_batch)):
                with engine.micro_batch(last=n == engine.accumulation - 1):
                    given = (*mixed[n], text_items) if mixed else None
                    loss, found = losses(engine, experience, index, items, options, warming=warming, texts=given)
                    # Before any backward pass of this mini-batch, so that there are no gradients to drop.
                    if n == 0 and not warming and _far(found, rows.mask[index], options):
                        work.looked(lengths[:micro_batch])
                        if mixed:
                            work.read(read[0].tolist(), learnt=False)
                        return stats.means(engine) | {"stopped": 1.0}
                    engine.backward(loss)
                    stats.add(found)
            stats.updated(engine.step())
            work.learnt(lengths, actor=not warming)
            if mixed:
                work.read(torch.cat(read).tolist())
    return stats.means(engine) | {"stopped": 0.0}


def losses(
    engine: Plain | Zero, experience: Experience, index: Tensor, items: Tensor, options: OnlineOptions, *, warming: bool, texts: Any
) -> rl.PPOLoss:  # fmt: skip
    """Loss and statistics of a micro-batch, its share of those of the mini-batch."""
    ids, attention, mask, kept = experience.rollout.rows(index)
    part = lambda x: None if x is None else x[index, kept]  # noqa: E731
    values, returns = part(experience.values), part(experience.returns)
    if warming:
        loss = engine("value_loss", ids, attention, mask, returns, values, items, options.value_clip)
        return rl.PPOLoss(loss, {"value_loss": loss.detach()})
    return engine(
        "policy_loss", ids, attention, mask, part(experience.logprobs), part(experience.advantages), texts=texts,
        ptx_coef=options.ptx_coef, old_values=values, returns=returns, value_clip=options.value_clip,
        value_coef=options.value_coef, clip_low=options.clip_low, clip_high=options.clip_high, dual_clip=options.dual_clip,
        ref_logprobs=part(experience.ref_logprobs) if options.kl_loss_coef else None, kl_coef=options.kl_loss_coef,
        with_entropy=True, entropy_coef=options.entropy_coef, level=options.level, aggregation=options.aggregation,
        num_items=items,
    )  # fmt: skip


def _items(mask: Tensor, options: OnlineOptions) -> Tensor:
    """What the losses of a mini-batch are divided by."""
    if options.aggregation == "token-mean":
        return mask.sum().float()
    each = options.max_new_tokens if options.aggregation == "token-sum-norm" else 1
    return torch.tensor(float(len(mask) * each), device=mask.device)


def _far(stats: dict[str, Tensor], mask: Tensor, options: OnlineOptions) -> bool:
    return rl.should_stop(stats["approx_kl"], options.target_kl, count=mask.sum())


class _Stats:
    """Statistics of micro-batches, kept on the device until an iteration's end."""

    def __init__(self) -> None:
        self.found: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def add(self, stats: dict[str, Tensor]) -> None:
        self.found.append({name: value.detach().float() for name, value in stats.items()})

    def updated(self, norm: float) -> None:
        self.norms.append(norm)

    def means(self, engine: Plain | Zero) -> dict[str, float]:
        means = {"updates": float(len(self.norms))}
        if not self.norms:
            return means
        names = [name for name in self.found[0] if name != "ratio_max"]
        table = torch.stack([torch.stack([stats[name] for name in names]) for stats in self.found])
        summed = engine.sum(table.sum(0)).tolist()
        for name, value in zip(names, summed):
            means[name] = value / (len(self.norms) if name in _SUMS else len(self.found) * engine.world)
        if "ratio_max" in self.found[0]:
            mine = torch.stack([stats["ratio_max"] for stats in self.found]).max().item()
            means["ratio_max"] = torch.tensor(together.everywhere(mine)).max().item()  # which keeps a NaN
        means["grad_norm"] = sum(self.norms) / len(self.norms)
        return means
