"""What the environment says about how calls run. A variable is read once, when it is first asked for: looking one up costs a
microsecond, and a call would pay it each time. `forget` has everything looked up again."""

from __future__ import annotations

import functools
import os

# Stands for all that a plan rests on beside the call: what was planned under one state may not hold under the next.
state = object()


@functools.cache
def read(name: str) -> str:
    """The variable's text without surrounding blanks; "" where it is not set."""
    return os.environ.get(name, "").strip()


def forget() -> None:
    """Let the next call read the environment, and be planned, anew."""
    read.cache_clear()
    planned_anew()


def planned_anew() -> None:
    """To be called when something else that plans rest on has changed."""
    global state
    state = object()
