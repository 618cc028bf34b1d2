"""Boxes filled by copy engines: each process writes into the others' memory, which it has mapped, and no kernel runs.

NCCL's kernels hold multiprocessors that a persistent attention kernel counts on, and copy into buffers that have to be packed and unpacked.
Here a part goes from the caller's tensor to its place in the other's box, by copies of rows.

Processes tell each other by words in that memory, which streams write and wait for; no host waits:

    arrived[s][b]   at the receiver: how many times s has filled box b
    freed[r][b]     at the sender: how many times r was done with what it got in box b

A sender fills box b for the n-th time when freed has come to n − 1, and begins a call, whose boxes may lie elsewhere, when all are freed.
Words count on from call to call, cyclically.
What a stream waits for was asked for earlier, in the order of calls that all processes share: streams that share a hardware queue can't
block each other for good.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from ..device.libcuda import NoDriver
from ..errors import CudaError
from .boxes import Box, Exchange, Form

BOXES = 4  # at one time
ALIGN = 256
GRAIN = 1 << 21  # memory is taken in such pieces
TRIAL_ROWS, TRIAL_WIDTH = 16, 128


class Lane(enum.Enum):
    """Where work waits in line. Each is a stream of its own on a card."""

    CURRENT = 0  # the caller's
    SENDING = 1
    LOCAL = 2  # copies within the card: they must not hold up what others wait for


def gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every process's value, in the order of ranks; of all processes where `group` is None. A collective.

    Outside of inference mode, in which ComfyUI samples: torch 2.5's gloo writes to the tensors that it makes on a thread that is in none.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    with torch.inference_mode(False):
        dist.all_gather_object(found, value, group=group)
    return found


class Memory(Protocol):
    """A card's memory that other processes map, and work on it: `card.Card`, and what stands for one in tests."""

    def allocate(self, size: int) -> tuple[torch.Tensor, bytes]:
        """uint8 [size] of zeros, and by what other processes open it. Raises CudaError or NoDriver."""

    def free(self) -> None: ...

    def open(self, handle: bytes) -> int:
        """Map another process's memory; its address."""

    def close(self, address: int) -> None: ...

    def follow(self, lane: Lane, other: Lane) -> None:
        """Later work of a lane waits for all that the other was given so far."""

    def mark(self, lane: Lane) -> Any:
        """What the lane was given so far, for `after`."""

    def after(self, lane: Lane, mark: Any) -> None: ...

    def copy(self, lane: Lane, target: int, source: int, width: int, height: int, target_pitch: int, source_pitch: int) -> None: ...

    def write(self, lane: Lane, address: int, value: int) -> None: ...

    def wait(self, lane: Lane, address: int, value: int) -> None:
        """Until the word has counted up to the value, cyclically."""

    def synchronize(self) -> None:
        """The host waits for all lanes."""


class Rows(NamedTuple):
    """A copy of equally long rows, in bytes from each tensor's beginning."""

    target: int
    source: int
    width: int
    height: int
    target_pitch: int
    source_pitch: int


def rows(target: torch.Tensor, source: torch.Tensor) -> Iterator[Rows]:
    """The copies that make up `target.copy_(source)`.

    Args:
        target, source: of one shape and dtype; the last stride is 1, no two elements share an address.
    """
    if not target.numel():
        return
    size = target.element_size()
    axes = sorted(
        ((a, b, n) for n, a, b in zip(target.shape, target.stride(), source.stride(), strict=True) if n > 1), reverse=True
    )  # fmt: skip
    joined: list[tuple[int, int, int]] = []  # (target's stride, source's, length), the innermost last
    for a, b, n in axes:
        if joined and joined[-1][:2] == (a * n, b * n):
            n *= joined.pop()[2]
        joined.append((a, b, n))
    width = joined.pop()[2] if joined and joined[-1][:2] == (1, 1) else 1
    outer_a, outer_b, height = joined.pop(max(range(len(joined)), key=lambda i: joined[i][2])) if joined else (width, width, 1)
    for index in range(math.prod(n for _, _, n in joined)):
        to = begin = 0
        for a, b, n in joined:
            index, position = divmod(index, n)
            to, begin = to + a * position, begin + b * position
        yield Rows(size * to, size * begin, size * width, height, size * outer_a, size * outer_b)


def readable(t: torch.Tensor) -> torch.Tensor:
    """The tensor, as `rows` takes it: one that was expanded, say, is copied."""
    plain = t.stride(-1) == 1 and all(stride for stride, n in zip(t.stride(), t.shape, strict=True) if n > 1)
    return t if plain else t.contiguous()


class Copies(Exchange):
    """An exchange by copies between the processes of a group; one for the life of the group."""

    def __init__(self, memory: Memory, group: dist.ProcessGroup):
        self._memory, self._group = memory, weakref.ref(group)  # the group is by what its copies are found
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._others = [(self._rank + i) % self._size for i in range(1, self._size)]  # each process begins with another one
        self._flag_bytes = -(-2 * self._size * BOXES * 4 // ALIGN) * ALIGN
        self._data: torch.Tensor | None = None
        self._bases: dict[int, int] = {}  # of each process's memory, mapped here
        self._filled: dict[Box, Any] = {}  # sent here and not done → the mark of this process's own part
        self._held: list[torch.Tensor] = []  # what is being read
        self._forget()

    def _forget(self) -> None:
        self._sent: defaultdict[tuple[int, int], int] = defaultdict(int)  # (process, box) → messages
        self._taken: defaultdict[tuple[int, int], int] = defaultdict(int)

    # Memory. All of this is done by all processes together, and waits for the host.

    def bytes_of(self, like: torch.Tensor, forms: Sequence[Form]) -> int:
        """What boxes of these forms take."""
        each = ((form.count, math.prod(shape) * like.element_size()) for form in forms for shape in form.shapes)
        return self._flag_bytes + sum(count * -(-size // ALIGN) * ALIGN for count, size in each)

    def reserve(self, size: int) -> str:
        """Have memory for so many bytes at every process.

        Returns:
            "", or why some process can't; then none has any.
        """
        if self._data is not None and self._data.numel() >= size:
            return ""
        self.release()
        handle, reason = b"", ""
        try:
            with torch.inference_mode(False):  # later calls outside of one write to it
                self._data, handle = self._memory.allocate(-(-size // GRAIN) * GRAIN)
        except (CudaError, NoDriver) as error:
            reason = str(error)
        found = self._gather((handle, reason))
        reason = next((reason for _, reason in found if reason), "")
        if not reason:
            assert self._data is not None
            try:
                self._bases[self._rank] = self._data.data_ptr()
                for process in self._others:
                    self._bases[process] = self._memory.open(found[process][0])
                self._begin_trial()
            except CudaError as error:
                reason = str(error)
            reason = next(filter(None, self._gather(reason)), "") or self._end_trial()
        if reason:
            self.release()
        return reason

    def release(self) -> None:
        """Give the memory back."""
        self._memory.synchronize()
        for process in self._others:
            if process in self._bases:
                self._memory.close(self._bases[process])
        self._bases.clear()
        self._gather(None)  # nobody has it mapped any more
        if self._data is not None:
            self._data = None
            self._memory.free()
        self._forget()

    def _gather(self, value: Any) -> list[Any]:
        return gather(value, self._group())

    def _trial_places(self) -> torch.Tensor:
        assert self._data is not None
        count = self._size * TRIAL_ROWS * 2 * TRIAL_WIDTH
        return self._data[self._flag_bytes : self._flag_bytes + count].view(self._size, TRIAL_ROWS, 2 * TRIAL_WIDTH)

    def _begin_trial(self) -> None:
        """Some virtual machines map a peer's memory and lose what is written to it: write to each process, and see."""
        places = self._trial_places()[:, :, :TRIAL_WIDTH]
        part = torch.full(places.shape[1:], self._rank + 1, dtype=torch.uint8, device=places.device)
        self._memory.follow(Lane.SENDING, Lane.CURRENT)
        for process in self._bases:
            self._copy(Lane.SENDING, process, places[self._rank], part)
            self._memory.write(Lane.SENDING, self._word(process, "arrived", self._rank, 0), self._rank + 1)
        self._memory.synchronize()
        for lane in Lane:
            self._memory.wait(lane, self._word(self._rank, "arrived", self._rank, 0), self._rank + 1)
        self._memory.synchronize()

    def _end_trial(self) -> str:
        assert self._data is not None
        places, words = self._trial_places().cpu(), self._data[: self._flag_bytes].view(torch.int32).cpu()
        expected = torch.arange(1, self._size + 1, dtype=torch.uint8, device="cpu")[:, None, None]
        here = bool((places[:, :, :TRIAL_WIDTH] == expected).all()) and not bool(places[:, :, TRIAL_WIDTH:].any())
        here &= words[: self._size * BOXES : BOXES].tolist() == list(range(1, self._size + 1))
        self._data.zero_()
        self._memory.synchronize()
        return "" if all(self._gather(here)) else "what one card wrote to another's memory did not arrive"

    def _word(self, where: int, kind: str, process: int, box: int) -> int:
        """The address of arrived[process][box] or freed[process][box] at a process."""
        return self._bases[where] + 4 * (((kind == "freed") * self._size + process) * BOXES + box)

    # A call.

    def boxes(self, like: torch.Tensor, forms: Sequence[Form]) -> list[list[Box]]:
        assert self._data is not None and sum(form.count for form in forms) <= BOXES
        offset, number = self._flag_bytes, 0
        made: list[list[Box]] = []
        for form in forms:
            made.append([])
            for _ in range(form.count):
                wholes = []
                for shape in form.shapes:
                    size = math.prod(shape) * like.element_size()
                    wholes.append(self._data[offset : offset + size].view(like.dtype).view(shape))
                    offset += -(-size // ALIGN) * ALIGN
                made[-1].append(Box(number, form, wholes))
                number += 1
        for (process, box), count in self._sent.items():
            self._memory.wait(Lane.SENDING, self._word(self._rank, "freed", process, box), count)
        return made

    def send(self, box: Box, parts: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        ready = {process: [readable(t) for t in tensors] for process, tensors in parts.items()}
        self._held += [t for tensors in ready.values() for t in tensors]
        self._memory.follow(Lane.SENDING, Lane.CURRENT)
        for process in self._others:
            if process not in ready:
                continue
            count = self._sent[process, box.number]
            self._memory.wait(Lane.SENDING, self._word(self._rank, "freed", process, box.number), count)
            for place, part in zip(box.places, ready[process], strict=True):
                self._copy(Lane.SENDING, process, place[self._rank], part)
            self._sent[process, box.number] = count + 1
            self._memory.write(Lane.SENDING, self._word(process, "arrived", self._rank, box.number), count + 1)
        if self._rank in ready:
            self._stay([(place[self._rank], part) for place, part in zip(box.places, ready[self._rank], strict=True)], idle)
        self._filled[box] = self._memory.mark(Lane.LOCAL)

    def wait(self, box: Box) -> None:
        self._memory.after(Lane.CURRENT, self._filled[box])
        self._await(Lane.CURRENT, box)

    def done(self, box: Box) -> None:
        self._free(Lane.CURRENT, box)

    def collect(self, box: Box, targets: Mapping[int, Sequence[torch.Tensor]], idle: bool = False) -> None:
        lane = Lane.CURRENT if idle else Lane.LOCAL
        self._await(lane, box)
        self._stay([(target, place[p]) for p in targets for place, target in zip(box.places, targets[p], strict=True)], idle)
        self._free(lane, box)

    def copy(self, target: torch.Tensor, source: torch.Tensor, idle: bool = False) -> None:
        source = readable(source)
        self._held.append(source)
        self._stay([(target, source)], idle)

    def close(self) -> None:
        for box in list(self._filled):
            self.wait(box)
            self.done(box)
        for lane in (Lane.SENDING, Lane.LOCAL):
            self._memory.follow(lane, Lane.CURRENT)  # the next call may come on another stream
            self._memory.follow(Lane.CURRENT, lane)
        self._held.clear()

    def _await(self, lane: Lane, box: Box) -> None:
        for process in box.form.senders:
            self._memory.wait(lane, self._word(self._rank, "arrived", process, box.number), self._taken[process, box.number] + 1)

    def _free(self, lane: Lane, box: Box) -> None:
        del self._filled[box]
        for process in box.form.senders:
            self._taken[process, box.number] += 1
            self._memory.write(lane, self._word(process, "freed", self._rank, box.number), self._taken[process, box.number])

    def _stay(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], idle: bool) -> None:
        """Copies within the card, from the second of each pair. A copy engine takes one and a half to three times as long as a kernel."""
        if not idle:
            self._memory.follow(Lane.LOCAL, Lane.CURRENT)
        for target, source in pairs:
            if idle:
                target.copy_(source)
            else:
                self._copy(Lane.LOCAL, self._rank, target, source)

    def _copy(self, lane: Lane, process: int, place: torch.Tensor, part: torch.Tensor) -> None:
        """Copy into a process's memory, where `place` lies in this one's."""
        target = self._bases[process] + place.data_ptr() - self._bases[self._rank]
        for piece in rows(place, part):
            self._memory.copy(lane, target + piece.target, part.data_ptr() + piece.source, *piece[2:])
