"""fastllm: fused kernels and length extrapolation for LLMs."""

from fastllm import backends, ops, rl, rope
from fastllm.backends import use_backend
from fastllm.errors import BackendError, CheckpointError, ConfigError, DataError, FastLLMError, PatchError
from fastllm.patching import DilatedConfig, PatchReport, patch, patched, unpatch
from fastllm.rope import extend_context, restore_context

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
    "backends",
    "extend_context",
    "ops",
    "patch",
    "patched",
    "restore_context",
    "rl",
    "rope",
    "unpatch",
    "use_backend",
]
