"""DeepSpeed's configuration for a ZeRO stage, in the form that transformers completes ("auto")."""

from __future__ import annotations

import os
from typing import Any


def launched() -> bool:
    """Whether a launcher (deepspeed, torchrun) started this process as one of several, or alone under its environment."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join() -> None:
    """Without a GPU, has DeepSpeed know the processes before ZeRO-3 shards a model that is being loaded; with one, transformers does."""
    import torch

    if launched() and not torch.accelerator.is_available():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def settings(stage: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's JSON.

    Args:
        stage: 0 replicates everything, 1 shards the optimizer's state, 2 the gradients too, 3 the weights too.
        offload: "none", "optimizer", or "all" (of stage 3: optimizer and weights), what lives in CPU memory.
    """
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        zero["stage3_prefetch_bucket_size"] = "auto"
        zero["stage3_param_persistence_threshold"] = "auto"
    if stage:
        zero["reduce_bucket_size"] = "auto"
        zero["overlap_comm"] = stage == 3
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # transformers makes the optimizer, torch's AdamW by default
        "zero_force_ds_cpu_optimizer": False,
    }
