"""Kernels of several operations, for groups of cells, in Triton."""
