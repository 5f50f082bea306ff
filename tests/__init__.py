"""Tests. Kernels run under Triton's interpreter here, which Triton must know before anything imports it."""

from tests.kernels import support  # noqa: F401  sets TRITON_INTERPRET
