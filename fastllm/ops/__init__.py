"""The kernels as functions, for scripts that patch nothing. All are differentiable and registered with PyTorch."""

from fastllm.ops.apply_rope import apply_rope
from fastllm.ops.rms_norm import rms_norm
from fastllm.ops.rope import rope

__all__ = ["apply_rope", "rms_norm", "rope"]
