"""fastllm: fused kernels and length extrapolation for LLMs."""

from fastllm import backends, ops
from fastllm.backends import use_backend
from fastllm.errors import BackendError, CheckpointError, ConfigError, DataError, FastLLMError, PatchError
from fastllm.patching import DilatedConfig, PatchReport, patch, patched, unpatch

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
    "ops",
    "patch",
    "patched",
    "unpatch",
    "use_backend",
]
