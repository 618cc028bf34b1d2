"""Memory of a card that processes of one host share: the driver's calls that map it, copy to it without a kernel, and have streams wait
for each other by words in it. No torch.

`cuMemAlloc` and not torch's allocator: that of expandable segments or of `backend:cudaMallocAsync` gives memory that has no IPC handle.
"""

from __future__ import annotations

import ctypes
import functools

from ..errors import CudaError
from . import libcuda
from .libcuda import check

HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
LAZY_ENABLE_PEER_ACCESS = 1  # cuIpcOpenMemHandle's flag
DEVICE_MEMORY = 2  # CUmemorytype
WAIT_VALUE_GEQ = 0  # until (int32_t)(word - value) >= 0
WRITE_VALUE_DEFAULT = 0  # after a system-wide memory barrier


class _Handle(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * HANDLE_BYTES)]


class _Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        (f"{side}{name}", kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t), ("Y", ctypes.c_size_t), ("MemoryType", ctypes.c_int), ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64), ("Array", ctypes.c_void_p), ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]  # fmt: skip


_ADDRESS, _STREAM, _U = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint
_SIGNATURES = {
    "cuMemAlloc_v2": (ctypes.POINTER(_ADDRESS), ctypes.c_size_t),
    "cuMemFree_v2": (_ADDRESS,),
    "cuIpcGetMemHandle": (ctypes.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (ctypes.POINTER(_ADDRESS), _Handle, _U),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuMemcpy2DAsync_v2": (ctypes.POINTER(_Memcpy2D), _STREAM),
    "cuStreamWriteValue32_v2": (_STREAM, _ADDRESS, ctypes.c_uint32, _U),
    "cuStreamWaitValue32_v2": (_STREAM, _ADDRESS, ctypes.c_uint32, _U),
}


@functools.cache
def _calls() -> ctypes.CDLL:
    """The driver library with these calls typed. They are not `libcuda`'s: attention does not need them.

    Raises:
        CudaError: this driver lacks one.
    """
    cuda = libcuda.library()
    for name, arguments in _SIGNATURES.items():
        try:
            function = getattr(cuda, name)
        except AttributeError:
            raise CudaError(f"{libcuda.LIBRARY} has no {name}: the driver ({libcuda.driver_version()}) is too old") from None
        function.argtypes, function.restype = arguments, ctypes.c_int
    return cuda


def allocate(size: int) -> int:
    """The address of so many bytes in the current context."""
    address = _ADDRESS()
    check(_calls().cuMemAlloc_v2(ctypes.byref(address), size), f"cuMemAlloc({size} bytes)")
    return address.value


def free(address: int) -> None:
    check(_calls().cuMemFree_v2(address), "cuMemFree")


def handle(address: int) -> bytes:
    """By what another process opens an allocation."""
    found = _Handle()
    check(_calls().cuIpcGetMemHandle(ctypes.byref(found), address), "cuIpcGetMemHandle")
    return bytes(found.data)


def open_handle(data: bytes) -> int:
    """Map another process's allocation into the current context; its address here. The other card has to be a peer of this one."""
    address = _ADDRESS()
    known = _Handle.from_buffer_copy(data)
    check(_calls().cuIpcOpenMemHandle_v2(ctypes.byref(address), known, LAZY_ENABLE_PEER_ACCESS), "cuIpcOpenMemHandle")
    return address.value


def close_handle(address: int) -> None:
    check(_calls().cuIpcCloseMemHandle(address), "cuIpcCloseMemHandle")


def copy_rows(stream: int, target: int, source: int, width: int, height: int, target_pitch: int, source_pitch: int) -> None:
    """Copy `height` rows of `width` bytes, so many bytes apart, by a copy engine, on a stream."""
    copy = _Memcpy2D(
        srcMemoryType=DEVICE_MEMORY, srcDevice=source, srcPitch=source_pitch,
        dstMemoryType=DEVICE_MEMORY, dstDevice=target, dstPitch=target_pitch, WidthInBytes=width, Height=height,
    )  # fmt: skip
    check(_calls().cuMemcpy2DAsync_v2(ctypes.byref(copy), stream), f"cuMemcpy2DAsync({height} rows of {width} bytes)")


def write_word(stream: int, address: int, value: int) -> None:
    """Write a 32-bit word when the stream comes to it; what the stream did before is visible to who sees the word."""
    check(_calls().cuStreamWriteValue32_v2(stream, address, value & 0xFFFFFFFF, WRITE_VALUE_DEFAULT), "cuStreamWriteValue32")


def await_word(stream: int, address: int, value: int) -> None:
    """Keep the stream waiting until a 32-bit word of this card's memory has counted up to `value`, cyclically."""
    check(_calls().cuStreamWaitValue32_v2(stream, address, value & 0xFFFFFFFF, WAIT_VALUE_GEQ), "cuStreamWaitValue32")
