"""Kernels over the arena: plain PyTorch references, the Triton kernels beside them, and their launchers."""
