"""The ways to run a plan."""
