"""Measurements of the kernels on a GPU whose results are committed: `python -m bench [NAME ...]` from kernels/."""
