"""Implementations that need csrc/'s library for a CPU, for tests' parameters."""

from kernels.common import csrc_libraries

# Whether it is there where it could be is for tests/test_csrc_build.py.
CPU_FORMS = () if csrc_libraries.unavailable(csrc_libraries.CPU) else ("cpu",)
