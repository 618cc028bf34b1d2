"""What the environment says about how calls run. A variable is read once, when it is first asked for: looking one up costs a
microsecond, and a call would pay it each time."""

from __future__ import annotations

import functools
import os


@functools.cache
def read(name: str) -> str:
    """The variable's text without surrounding blanks; "" where it is not set."""
    return os.environ.get(name, "").strip()
