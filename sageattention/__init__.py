"""Quantised attention with kernels of its own."""
