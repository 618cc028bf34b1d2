"""`copies.Memory` of a CUDA card."""

from __future__ import annotations

import torch

from .. import torch_internals
from ..device import libcuda, peer_memory
from ..errors import CudaError
from .copies import Lane


class _Bytes:
    """Device memory for torch.as_tensor."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


class Card:
    def __init__(self, index: int):
        self._index, self._context = index, libcuda.primary_context(index)
        self._address = 0
        self._streams = {lane: torch.cuda.Stream(index) for lane in (Lane.SENDING, Lane.LOCAL)}

    def allocate(self, size: int) -> tuple[torch.Tensor, bytes]:
        with libcuda.current(self._context):
            try:
                address = peer_memory.allocate(size)
            except CudaError:
                torch.cuda.empty_cache()  # what torch's allocator keeps for itself
                address = peer_memory.allocate(size)
            try:
                handle = peer_memory.handle(address)
            except CudaError:
                peer_memory.free(address)
                raise
        self._address = address
        data = torch.as_tensor(_Bytes(address, size), device=f"cuda:{self._index}")
        data.zero_()
        self.synchronize()
        return data, handle

    def free(self) -> None:
        with libcuda.current(self._context):
            peer_memory.free(self._address)

    def open(self, handle: bytes) -> int:
        with libcuda.current(self._context):
            return peer_memory.open_handle(handle)

    def close(self, address: int) -> None:
        with libcuda.current(self._context):
            peer_memory.close_handle(address)

    def follow(self, lane: Lane, other: Lane) -> None:
        self._stream(lane).wait_stream(self._stream(other))

    def mark(self, lane: Lane) -> torch.cuda.Event:
        return self._stream(lane).record_event()

    def after(self, lane: Lane, mark: torch.cuda.Event) -> None:
        self._stream(lane).wait_event(mark)

    def copy(self, lane: Lane, target: int, source: int, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
        peer_memory.copy_rows(self._handle(lane), target, source, width, height, target_pitch, source_pitch)

    def write(self, lane: Lane, address: int, value: int) -> None:
        peer_memory.write_word(self._handle(lane), address, value)

    def wait(self, lane: Lane, address: int, value: int) -> None:
        peer_memory.await_word(self._handle(lane), address, value)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._index)

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._index) if lane is Lane.CURRENT else self._streams[lane]

    def _handle(self, lane: Lane) -> int:
        return torch_internals.current_stream(self._index) if lane is Lane.CURRENT else self._streams[lane].cuda_stream
