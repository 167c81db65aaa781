"""The kernels as functions, for scripts that patch nothing. All are differentiable and registered with PyTorch."""

from fastllm.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
