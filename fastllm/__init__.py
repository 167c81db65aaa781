"""fastllm: fused kernels and length extrapolation for LLMs."""

from typing import TYPE_CHECKING, Any

from fastllm import backends, ops, rl, rope
from fastllm.backends import use_backend
from fastllm.errors import BackendError, CheckpointError, ConfigError, DataError, FastLLMError, PatchError
from fastllm.patching import DilatedConfig, PatchReport, patch, patched, unpatch
from fastllm.rope import extend_context, restore_context

if TYPE_CHECKING:
    from fastllm.streaming import StreamingCache
    from fastllm.train import plan

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DilatedConfig",
    "FastLLMError",
    "PatchError",
    "PatchReport",
    "StreamingCache",
    "backends",
    "extend_context",
    "ops",
    "patch",
    "patched",
    "plan",
    "restore_context",
    "rl",
    "rope",
    "streaming",
    "unpatch",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for."""
    import importlib

    if name == "plan":
        return importlib.import_module("fastllm.train.plan")
    if name in ("StreamingCache", "streaming"):
        streaming = importlib.import_module("fastllm.streaming")
        return streaming if name == "streaming" else streaming.StreamingCache
    raise AttributeError(f"module 'fastllm' has no attribute {name!r}")
