"""Kernels and nothing else: `cpp` loads the C++ extension, `triton` holds the GPU kernels. Autograd is in `ops`."""
