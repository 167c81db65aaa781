"""Patching: kernels put into one model instance, proven on it, reported, and undone to the last bit."""

from fastllm.patching.dilated import DilatedConfig
from fastllm.patching.patch import patch, patched, unpatch
from fastllm.patching.report import PatchReport

__all__ = ["DilatedConfig", "PatchReport", "patch", "patched", "unpatch"]
