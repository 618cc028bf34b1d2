"""The share of blocks that each layer computed, read from the device a step later, so that nobody waits for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_SHARE = 0.7  # above it the router's time and the lists' cost more than the blocks left out save


class _Reading(NamedTuple):
    layers: list[str]
    values: torch.Tensor
    ready: torch.cuda.Event | None


class Shares:
    """The shares of one sampling on one device.

    Attributes:
        crowded: layers → share, where sparsity can't pay.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.crowded: dict[str, float] = {}
        self._step: object = None
        self._noted: dict[str, torch.Tensor] = {}
        self._reading: _Reading | None = None

    def begin(self, step: object) -> None:
        """Called before each call; does something where a step begins."""
        if step is self._step or (self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        self._step = step
        self._read()
        if self._noted and self._reading is None:
            self._reading = _fetch(self._noted)
            self._noted = {}
        if self._reading is not None and self._reading.ready is None:
            self._read()

    def note(self, layer: str, share: torch.Tensor) -> None:
        """`share`, a scalar, is what a layer computed in this step."""
        self._noted[layer] = share

    def _read(self) -> None:
        reading = self._reading
        if reading is None or (reading.ready is not None and not reading.ready.query()):
            return
        self._reading = None
        for layer, share in zip(reading.layers, reading.values.tolist()):
            if share > MAX_SHARE:
                self.crowded[layer] = share


def _fetch(noted: dict[str, torch.Tensor]) -> _Reading:
    values = torch.stack(list(noted.values()))
    if not values.is_cuda:
        return _Reading(list(noted), values, None)
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record(torch.cuda.current_stream(values.device))
    return _Reading(list(noted), host, ready)
