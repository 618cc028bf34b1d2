"""When and where in a sampling a patch is at work: a window of steps, and a list of the model's blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sampling import Sampling, Step

MAX_BLOCK = 9_999  # a typing error such as 0-10000000 should not fill the memory


class Blocks(frozenset[int]):
    """Numbers of a model's blocks; prints as it is written, "0, 1, 47-49"."""

    @classmethod
    def parse(cls, text: str) -> Blocks:
        """Numbers and ranges, "0, 1, 47-49", with commas, semicolons or spaces between; "" is the empty list.

        Raises:
            ValueError: anything else, with a sentence for the user.
        """
        numbers: set[int] = set()
        for part in re.sub(r"\s*-\s*", "-", text).replace(",", " ").replace(";", " ").split():
            found = re.fullmatch(r"(\d+)(?:-(\d+))?", part, re.ASCII)
            if found is None:
                raise ValueError(f"'{part}' is no block: write numbers and ranges with commas between them, such as 0, 1, 47-49.")
            first, last = int(found[1]), int(found[2] or found[1])
            if last < first:
                raise ValueError(f"the range {part} ends before it starts: write {last}-{first}.")
            if last > MAX_BLOCK:
                raise ValueError(f"there is no block {last}: models have a few dozen, counted from 0.")
            numbers.update(range(first, last + 1))
        return cls(numbers)

    def __str__(self) -> str:
        ranges: list[list[int]] = []
        for number in sorted(self):
            if ranges and number == ranges[-1][1] + 1:
                ranges[-1][1] = number
            else:
                ranges.append([number, number])
        return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


@dataclass(frozen=True)
class Window:
    """The steps from one percentage of a sampling to another, as ComfyUI counts them: by the sigma that the model has there, which is
    not the share of the steps.

    Attributes:
        start, end: 0 to 1; both ends are inside.
    """

    start: float = 0.0
    end: float = 1.0

    def __str__(self) -> str:
        return f"{self.start:g} to {self.end:g}"

    def problem(self) -> str:
        """Why there is no such window, in a sentence for the user; "" where there is."""
        for name, value in (("start_percent", self.start), ("end_percent", self.end)):
            if not 0 <= value <= 1:
                return f"{name} is {value:g}, but has to be between 0 (the first step) and 1 (the last)."
        if self.start > self.end:
            return f"start_percent ({self.start:g}) is above end_percent ({self.end:g}): no step would be left. Swap them, or widen one."
        return ""

    def outside(self, sampling: Sampling, step: Step) -> str:
        """Why a call is outside of the window, "" inside. Reads the step's sigma from its device, once a step, unless all steps are in."""
        if self.start <= 0 and self.end >= 1:
            return ""
        sigma = step.sigma
        if sigma is None or sampling.percent_to_sigma is None:
            return "the model does not tell at which step it is, and only some steps are asked for"
        if sampling.sigma_at(self.end) <= sigma <= sampling.sigma_at(self.start):
            return ""
        return f"the step is outside of {self}"


@dataclass(frozen=True)
class Schedule:
    """The calls that a patch is for.

    Attributes:
        window: the steps.
        blocks: the blocks; None for all.
    """

    window: Window = Window()
    blocks: Blocks | None = None

    def refusal(self, sampling: Sampling, step: Step, block: int | None) -> str:
        """Why a call is not among them; "" where it is."""
        if self.blocks is not None and block not in self.blocks:
            if block is None:
                return "the model does not tell in which block it is, and only some blocks are asked for"
            return f"the block is none of {self.blocks}"
        return self.window.outside(sampling, step)
