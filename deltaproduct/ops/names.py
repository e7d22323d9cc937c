"""The names of `dispatch.BACKENDS` in their order, for the command line's help, which does not wait for PyTorch."""

BACKEND_NAMES = ("cpu", "triton", "triton_precise", "chunkwise", "reference")
