"""What processes that compute one attention send each other: boxes, memory that each process has for what comes from the others.

    with exchange.opened(q, group, Form(…)) as (link, (boxes,)):
        link.send(boxes[0], {process: tensors})   # and the same at the others
        link.wait(boxes[0])                       # the current stream has what was sent
        …                                         # boxes[0].wholes
        link.done(boxes[0])                       # it may be overwritten

Every process makes the same calls in the same order. Processes are counted in the group.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Form:
    """Boxes of one kind, of which every process has the same."""

    count: int
    shapes: tuple[tuple[int, ...], ...]  # of a box's tensors
    places: Callable[[torch.Tensor], torch.Tensor]  # of one of them → view [process, …]: what comes from each
    senders: tuple[int, ...]  # the other processes that send to this one
    receivers: tuple[int, ...]  # and those that this one sends to


@dataclass(eq=False)
class Box:
    number: int
    form: Form
    wholes: list[torch.Tensor]
    places: list[torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [self.form.places(whole) for whole in self.wholes]


class Exchange(abc.ABC):
    """A way to send. What was sent and not taken is taken at the latest when it closes.

    `idle`: the current stream has nothing better to do, so that it copies itself what stays on the card; else that happens beside it.
    """

    @abc.abstractmethod
    def boxes(self, like: torch.Tensor, forms: Sequence[Form]) -> list[list[Box]]:
        """Boxes of each form for one call, of `like`'s dtype and device."""

    @abc.abstractmethod
    def send(self, box: Box, parts: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        """Begin to send each process its parts, one for every tensor of the box, into this process's places there; this process's own part
        goes into its own box. The parts keep their values until `close`."""

    @abc.abstractmethod
    def wait(self, box: Box) -> None:
        """The current stream waits until the box is full."""

    @abc.abstractmethod
    def done(self, box: Box) -> None:
        """What the current stream has been given so far is the last to read the box."""

    @abc.abstractmethod
    def collect(self, box: Box, targets: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        """Copy what came from each process and be done with the box; the targets are whole after `close`. They are not written
        elsewhere."""

    @abc.abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor, idle: bool = False) -> None:
        """Copy what the current stream has made; the target is whole after `close`, and the source keeps its values until then."""

    @abc.abstractmethod
    def close(self) -> None:
        """The current stream waits for all that is under way."""
