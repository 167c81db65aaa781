"""Kernels and nothing else: `cpp` loads the C++ extension, `triton` holds the GPU kernels. Autograd lives in fastllm.ops."""
