"""Kernels that run alone: small ones beside attention, that need no plan and are left out where a card has none."""

from __future__ import annotations

import functools

import torch

from ... import torch_internals
from ...device import capability
from ...errors import KernelMissing
from ...kernels import binaries
from ...kernels.binaries import Entry
from ...kernels.table import IMAGES
from ...numerics import constants
from . import driver
from .launcher import Kernel

MAX_CTAS = 2**31 - 1
DTYPES = {getattr(torch, name): number for name, number in constants.DTYPES.items()}


@functools.cache
def kernel(index: int, entry: Entry) -> Kernel | None:
    """A kernel on a device; None where there is none for it, or it can't be loaded."""
    card = capability.of_device("cuda", index)
    name = next(image.name for image in IMAGES if entry in image.entries)
    image = binaries.select(IMAGES, name, card.arch) if card.device == "cuda" else None
    if image is None:
        return None
    try:
        return driver.kernel(index, image, entry.symbol, name)
    except KernelMissing:
        return None


def launch(index: int, kernel: Kernel, ctas: int, params: bytes) -> None:
    """Launch a kernel on a device's current stream."""
    driver.launch(index, torch_internals.current_stream(index), ((kernel, ctas, 1, 1, params, False),))
