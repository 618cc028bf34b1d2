"""What the variants compute, on any device."""
