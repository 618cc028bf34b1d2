"""The Triton variant."""
