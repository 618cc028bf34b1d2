"""What torch.autocast does to torch's own operators, and how what has to be exact escapes it. Importing it needs no torch."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any


def autocasts(device: str) -> bool:
    """Whether torch's products on devices of a type take their inputs in a narrower dtype, one for all, and give that back."""
    import torch

    return device != "meta" and torch.is_autocast_enabled(device)


def exact(device: str) -> AbstractContextManager[Any]:
    """A context in which products on devices of a type are computed in the dtype that they are written in."""
    import torch

    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()
