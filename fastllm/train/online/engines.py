"""How the models are run and trained: in one process, as replicas under DistributedDataParallel, or sharded by DeepSpeed.

All three have the same face, so that the loops do not ask which it is: call it as the module, ``backward`` each micro-batch,
``step`` after the last, and sample inside ``whole()``, where every weight is there.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from fastllm.errors import CheckpointError
from fastllm.train import checkpoint
from fastllm.train.online.models import Models

_PLAIN, _ZERO = "trained.pt", "deepspeed"  # in a checkpoint


def make(models: Models, args: Any, critic_learning_rate: float | None, steps: int) -> Plain | Zero:
    """The engine that the configuration and the launcher ask for.

    Args:
        args: Arguments; the optimizer is the one they name.
        critic_learning_rate: of the critic's parameters; None: args.learning_rate.
        steps: of the whole run, for what DeepSpeed's JSON leaves to be filled in.
    """
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, models)  # type: ignore[arg-type]
    optimizer = kind(_groups(models, args, critic_learning_rate), **options)
    return (Zero if args.deepspeed else Plain)(models, optimizer, args, steps)


def _groups(models: Models, args: Any, critic_learning_rate: float | None) -> list[dict[str, Any]]:
    """Parameters by model, matrices with weight decay and all else without."""
    groups = []
    for name, rate in (("actor", args.learning_rate), ("critic", critic_learning_rate)):
        model = getattr(models, name)
        trained = [p for p in model.parameters() if p.requires_grad] if model is not None else []
        for decays in (True, False):
            some = [p for p in trained if (len(getattr(p, "ds_shape", p.shape)) >= 2) == decays]
            if some:
                lr = args.learning_rate if rate is None else rate
                groups.append({
                    "params": some, "lr": lr, "full_lr": lr, "of": name, "weight_decay": args.weight_decay if decays else 0.0,
                })  # fmt: skip
    return groups


class _Ranks:
    world: int

    def sum(self, x: Tensor) -> Tensor:
        """Over processes."""
        if self.world > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x


class Plain(_Ranks):
    """One process, or one of several that each hold everything; gradients are averaged by DistributedDataParallel."""

    def __init__(self, models: Models, optimizer: torch.optim.Optimizer, args: Any, _: int) -> None:
        self.models, self.optimizer, self.device = models.to(args.device), optimizer, args.device
        self.clip, self.accumulation, self.world = args.max_grad_norm, args.gradient_accumulation_steps, args.world_size
        self.autocast = torch.bfloat16 if args.bf16 else None
        self.wrapped: nn.Module = models
        if self.world > 1:
            local = [args.device] if args.device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(models, device_ids=local, broadcast_buffers=False)

    def __call__(self, what: str, *args: Any, **kwargs: Any) -> Any:
        module = (
            self.wrapped if torch.is_grad_enabled() else self.models
        )  # DDP has nothing to do where nothing is learnt
        with self.computing():
            return module(what, *args, **kwargs)

    def computing(self) -> Any:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of a micro-batch: only the last of a mini-batch has gradients exchanged."""
        with contextlib.nullcontext() if last or self.world == 1 else self.wrapped.no_sync():  # type: ignore[operator]
            yield

    def backward(self, loss: Tensor) -> None:
        """Of losses that add up, over micro-batches and processes, to that of the mini-batch."""
        (loss * self.world).backward()

    def step(self) -> float:
        """The optimizer's step; the norm of the gradient before it was clipped."""
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, self.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm.item()

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """A block in which the actor's own weights may be read and it may generate."""
        with self.computing():
            yield

    def save(self, folder: Path, *, writes: bool) -> None:
        if writes:
            weights = {n: p for n, p in self.models.named_parameters() if p.requires_grad}
            torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, folder / _PLAIN)

    def load(self, folder: Path) -> None:
        path = folder / _PLAIN
        if not path.is_file():
            raise CheckpointError(f"{folder} was not written by a run without DeepSpeed: it has no {_PLAIN}")
        state = checkpoint.load(path)
        own = {n: p for n, p in self.models.named_parameters() if p.requires_grad}
        for name in sorted(own.keys() ^ state["weights"].keys()):
            raise CheckpointError(f"{folder} is of other models: {name} is {'not ' if name in own else ''}in it")
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != state["weights"][name].shape:
                    raise CheckpointError(f"{folder} is of other models: the shape of {name} differs")
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])


class Zero(_Ranks):
    """DeepSpeed. Frozen models are in the engine too: under ZeRO-3 they are sharded and gathered layer by layer like the rest."""

    def __init__(self, models: Models, optimizer: torch.optim.Optimizer, args: Any, steps: int) -> None:
        import deepspeed

        settings = args.hf_deepspeed_config
        settings.trainer_config_process(args)
        settings.trainer_config_finalize(args, models, steps)
        self.stage = settings.config.get("zero_optimization", {}).get("stage", 0)
        self.engine, *_ = deepspeed.initialize(
            model=models, optimizer=optimizer, config=settings.config,
            model_parameters=[p for group in optimizer.param_groups for p in group["params"]],
        )  # fmt: skip
        self.models, self.optimizer, self.device = models, optimizer, self.engine.device
        self.accumulation, self.world = args.gradient_accumulation_steps, args.world_size

    def __call__(self, what: str, *args: Any, **kwargs: Any) -> Any:
        return self.engine(what, *args, **kwargs)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(
            loss * (self.world * self.accumulation)
        )  # it divides by the latter and averages over processes
        self.engine.step()  # does nothing but count until the last

    def step(self) -> float:
        norm = self.engine.get_global_grad_norm()  # the step itself came with the last micro-batch
        return float("nan") if norm is None else float(norm)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        if self.stage != 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.models.actor.parameters())), _without_hooks(self.models.actor):
            yield

    def save(self, folder: Path, *, writes: bool) -> None:
        self.engine.save_checkpoint(str(folder), tag=_ZERO, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        if not (folder / _ZERO).is_dir():
            raise CheckpointError(f"{folder} was not written by a run under DeepSpeed: it has no folder {_ZERO}")
        path, _ = self.engine.load_checkpoint(str(folder), tag=_ZERO, load_module_strict=False)
        if path is None:
            raise CheckpointError(f"{folder} cannot be loaded by DeepSpeed")


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Hooks would let go of each gathered weight after its first use, and gather it again for every token."""
    kept = [(m, m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    for module, *_ in kept:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after
