"""Without a GPU, Triton kernels run in the interpreter on CPU tensors; set before triton is imported."""

import os

# A backward pass traced by an earlier version of an op must not come back from the disk: the cache's key omits it.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh tensors are filled with NaN, so an element that a kernel forgets to write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
