"""The native CPU engine: C++ built when the package is installed, without a dependency on PyTorch's C++ interface."""
