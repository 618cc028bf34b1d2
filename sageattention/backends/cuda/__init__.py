"""The CUDA variants."""
