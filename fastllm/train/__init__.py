"""Training: `fastllm train`, and its parts for a script of your own.

ThroughputCallback, Trainer, PackedDataset, PackingCollator and PaddingCollator need transformers and are imported when first
used; the counting of FLOPs and tokens needs torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastllm.train.throughput import StepFlops, Throughput, peak_flops, step_flops

if TYPE_CHECKING:
    from fastllm.train.callback import ThroughputCallback
    from fastllm.train.packing import PackedDataset, PackingCollator, PaddingCollator, first_fit_decreasing
    from fastllm.train.trainer import Trainer

_PLACES = {
    "ThroughputCallback": "callback",
    "PackedDataset": "packing",
    "PackingCollator": "packing",
    "PaddingCollator": "packing",
    "first_fit_decreasing": "packing",
    "Trainer": "trainer",
}
__all__ = [
    "PackedDataset",
    "PackingCollator",
    "PaddingCollator",
    "StepFlops",
    "Throughput",
    "ThroughputCallback",
    "Trainer",
    "first_fit_decreasing",
    "peak_flops",
    "step_flops",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(f"fastllm.train.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'fastllm.train' has no attribute {name!r}")
