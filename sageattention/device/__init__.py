"""The machine: its driver, and what its cards can do."""
