"""Floor 0: Triton kernels. The package works, trains and tests on a machine that has no Triton."""
