"""`exchange.copies.Memory` on the host, for tests: a file that processes map, and a thread for each lane, late at random."""

from __future__ import annotations

import ctypes
import mmap
import os
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sageattention.errors import CudaError
from sageattention.exchange.copies import Lane

PATIENCE = 60  # seconds until a wait counts as a deadlock


class HostCard:
    """
    delay: seconds that a lane sleeps at most before each piece of work.
    refuses: it has no memory.
    loses: what it copies elsewhere.
    """

    def __init__(self, delay: float = 0.0, refuses: bool = False, loses: bool = False):
        self.refuses, self.loses = refuses, loses
        self.copied = 0  # bytes
        self.failures: list[BaseException] = []
        self.maps: dict[int, mmap.mmap] = {}
        self.lanes: dict[Lane, queue.SimpleQueue[Callable[[], object]]] = {}
        self.delays = {}
        for lane in (Lane.SENDING, Lane.LOCAL):
            self.lanes[lane], self.delays[lane] = queue.SimpleQueue(), delay
            threading.Thread(target=self._work, args=(lane,), daemon=True).start()

    def _work(self, lane: Lane) -> None:
        while True:
            work = self.lanes[lane].get()
            time.sleep(random.uniform(0, self.delays[lane]))
            try:
                work()
            except BaseException as error:
                self.failures.append(error)

    def _put(self, lane: Lane, work: Callable[[], object]) -> None:
        if lane is Lane.CURRENT:
            work()
        else:
            self.lanes[lane].put(work)

    def _map(self, path: str) -> int:
        with Path(path).open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.maps[address] = mapped
        return address

    def allocate(self, size: int) -> tuple[torch.Tensor, bytes]:
        if self.refuses:
            raise CudaError("cuMemAlloc: this card has no memory")
        number, self.path = tempfile.mkstemp()
        os.truncate(number, size)
        os.close(number)
        return torch.frombuffer(self.maps[self._map(self.path)], dtype=torch.uint8), self.path.encode()

    def free(self) -> None:
        Path(self.path).unlink()

    def open(self, handle: bytes) -> int:
        return self._map(handle.decode())

    def close(self, address: int) -> None:
        assert address in self.maps

    def mark(self, lane: Lane) -> threading.Event:
        event = threading.Event()
        self._put(lane, event.set)
        return event

    def after(self, lane: Lane, mark: threading.Event) -> None:
        self._put(lane, lambda: mark.wait(PATIENCE) or self.failures.append(TimeoutError("a lane")))

    def follow(self, lane: Lane, other: Lane) -> None:
        self.after(lane, self.mark(other))

    def copy(self, lane: Lane, target: int, source: int, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
        assert height == 1 or (width <= target_pitch and width <= source_pitch)
        self.copied += width * height

        def work() -> None:
            for row in range(0 if self.loses else height):
                ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

        self._put(lane, work)

    def write(self, lane: Lane, address: int, value: int) -> None:
        self._put(lane, lambda: ctypes.memmove(address, ctypes.byref(ctypes.c_uint32(value)), 4))

    def wait(self, lane: Lane, address: int, value: int) -> None:
        def work() -> None:
            end = time.monotonic() + PATIENCE
            while ctypes.c_int32(ctypes.c_uint32.from_address(address).value - value).value < 0:
                if time.monotonic() > end:
                    raise TimeoutError(f"a word stays below {value}")
                time.sleep(1e-4)

        self._put(lane, work)

    def synchronize(self) -> None:
        for lane in self.lanes:
            self.follow(Lane.CURRENT, lane)
        if self.failures:
            raise self.failures[0]
