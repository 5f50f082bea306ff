"""Triton kernels, imported only where there is a GPU, or under Triton's interpreter."""
