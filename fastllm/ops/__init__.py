"""The kernels as functions, for scripts that patch nothing. All are differentiable and registered with PyTorch."""

from fastllm.ops.glu import geglu, swiglu
from fastllm.ops.rms_norm import rms_norm

__all__ = ["geglu", "rms_norm", "swiglu"]
