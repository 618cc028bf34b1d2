"""What install.py does, in rooms; from the ground up: `interpreter`, `wheel`, `installed`, `index`, `exchange`, `hook`. Stdlib only."""

import os
from pathlib import Path

PACK = Path(os.path.abspath(__file__)).parent.parent
PACKAGE, LAUNCHER = "sageattention", "sageattention-launcher"
KEYWORD = "sageattention-node-pack"  # in the metadata of our wheels, of nobody else's


class Problem(Exception):
    """What can't be done, why, and what to do. Nothing has changed."""


def module_of(name: str) -> str:
    """A distribution's name as its module and its files have it."""
    return name.replace("-", "_")
