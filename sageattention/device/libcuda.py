"""The CUDA driver library through ctypes: the few calls that find a device and load a kernel. No torch, no CUDA runtime.

Calls on the hot path are the launchers' (`launcher.py`); everything here runs once per device, image or kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator

from ..errors import CudaError
from ..kernels.architectures import OLDEST_DRIVER

LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
NVML = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"

GRAPHS_WITH_OVERLAP = 12030  # older drivers can't capture a programmatic dependent launch into a graph

# cuda.h
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
SHARED_SIZE_BYTES = 1
SHARED_MEMORY_PER_BLOCK_OPTIN = 97  # CUdevice_attribute
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76
CAPTURE_MODE_RELAXED = 2
JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 5, 6
NO_DEVICE, STUB_LIBRARY, NOT_FOUND = 100, 34, 500
# What cuModuleLoadDataEx answers when the image is at fault, or this driver and the image do not fit: invalid image, no
# binary for the GPU, invalid PTX, no JIT compiler, PTX too new, JIT disabled, invalid source.
IMAGE_REFUSED = frozenset({200, 209, 218, 221, 222, 223, 300})

_P, _I, _U = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint
_OUT_P, _OUT_I = ctypes.POINTER(_P), ctypes.POINTER(_I)
_SIGNATURES = {
    "cuInit": (_U,),
    "cuDriverGetVersion": (_OUT_I,),
    "cuDeviceGet": (_OUT_I, _I),
    "cuDeviceGetAttribute": (_OUT_I, _I, _I),
    "cuDeviceGetName": (ctypes.c_char_p, _I, _I),
    "cuDevicePrimaryCtxRetain": (_OUT_P, _I),
    "cuCtxGetCurrent": (_OUT_P,),
    "cuCtxPushCurrent_v2": (_P,),
    "cuCtxPopCurrent_v2": (_OUT_P,),
    "cuThreadExchangeStreamCaptureMode": (_OUT_I,),
    "cuModuleLoadDataEx": (_OUT_P, ctypes.c_char_p, _U, _OUT_I, _OUT_P),
    "cuModuleGetFunction": (_OUT_P, _P, ctypes.c_char_p),
    "cuFuncGetAttribute": (_OUT_I, _I, _P),
    "cuFuncSetAttribute": (_P, _I, _I),
    "cuGetErrorName": (_I, ctypes.POINTER(ctypes.c_char_p)),
    "cuGetErrorString": (_I, ctypes.POINTER(ctypes.c_char_p)),
    "cuLaunchKernel": (_P, _U, _U, _U, _U, _U, _U, _U, _P, _P, _P),
    "cuLaunchKernelEx": (_P, _P, _P, _P),
}


class NoDriver(Exception):
    """There is no usable NVIDIA driver; the message says why and what to do."""


class Refused(Exception):
    """The driver does not accept an image; the message is its code and its log."""


@functools.cache
def library() -> ctypes.CDLL:
    """The driver library with its calls typed, initialised.

    Raises:
        NoDriver: it is not installed, too old to have the calls, or sees no card.
        CudaError: it fails to initialise for another reason.
    """
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError as error:
        cause = str(error).partition(". Try using")[0]  # on Windows ctypes goes on with advice for its callers
        raise NoDriver(
            f"the NVIDIA driver's library {LIBRARY} can't be opened ({cause}); install a driver >= {OLDEST_DRIVER[1]}"
        ) from error
    for name, arguments in _SIGNATURES.items():
        try:
            function = getattr(cuda, name)
        except AttributeError:
            raise NoDriver(
                f"{LIBRARY} has no {name}: the driver ({_version_text(cuda)}) is too old, install one >= {OLDEST_DRIVER[1]}"
            ) from None
        function.argtypes, function.restype = arguments, _I
    code = cuda.cuInit(0)
    if code == STUB_LIBRARY:
        raise NoDriver(f"{LIBRARY} is the CUDA toolkit's stub, not a driver; take its folder off the library path")
    if code == NO_DEVICE:
        raise NoDriver("the NVIDIA driver sees no GPU (check CUDA_VISIBLE_DEVICES)")
    if code:
        raise CudaError(f"cuInit: {_describe(cuda, code)}")
    return cuda


def _describe(cuda: ctypes.CDLL, code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(name))
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"{(name.value or b'an unknown error').decode()} ({code}){': ' + text.value.decode() if text.value else ''}"


def describe(code: int) -> str:
    """A driver error as text: its name, code and the driver's own words."""
    return _describe(library(), code)


def check(code: int, call: str) -> None:
    """Raise CudaError for a driver call that failed.

    Args:
        code: what the call returned, a CUresult.
        call: its name and what it was called for.
    """
    if code:
        raise CudaError(f"{call}: {describe(code)}")


@functools.cache
def cuda_version() -> int:
    """The newest CUDA version the driver supports, as 1000 · major + 10 · minor."""
    value = _I()
    check(library().cuDriverGetVersion(ctypes.byref(value)), "cuDriverGetVersion")
    return value.value


def driver_version() -> str:
    """The driver's own version and the CUDA version it supports, for messages: "580.95.05, CUDA 13.0"."""
    return _version_text(library())


def _version_text(cuda: ctypes.CDLL) -> str:
    value = _I()
    cuda.cuDriverGetVersion(ctypes.byref(value))
    supported = f"CUDA {value.value // 1000}.{value.value % 1000 // 10}"
    name = _nvml_version()
    return f"{name}, {supported}" if name else supported


@functools.cache
def _nvml_version() -> str:
    """The driver's version as NVML tells it; empty where NVML is not installed (then the CUDA version has to do)."""
    try:
        nvml = ctypes.CDLL(NVML)
    except OSError:
        return ""
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlInit_v2() or nvml.nvmlSystemGetDriverVersion(text, len(text)):
        return ""
    return text.value.decode(errors="replace")


def device_attribute(index: int, attribute: int) -> int:
    """An integer attribute of the device `index`, which counts as torch's does."""
    handle, value = _I(), _I()
    check(library().cuDeviceGet(ctypes.byref(handle), index), f"cuDeviceGet({index})")
    check(library().cuDeviceGetAttribute(ctypes.byref(value), attribute, handle), f"cuDeviceGetAttribute({attribute}) of device {index}")
    return value.value


def device_name(index: int) -> str:
    """The device's marketing name."""
    handle, text = _I(), ctypes.create_string_buffer(256)
    check(library().cuDeviceGet(ctypes.byref(handle), index), f"cuDeviceGet({index})")
    check(library().cuDeviceGetName(text, len(text), handle), f"cuDeviceGetName({index})")
    return text.value.decode(errors="replace")


def primary_context(index: int) -> int:
    """The device's primary context, the one every CUDA runtime (torch's too) works in. Kept for the life of the process."""
    handle, context = _I(), _P()
    check(library().cuDeviceGet(ctypes.byref(handle), index), f"cuDeviceGet({index})")
    check(library().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), f"cuDevicePrimaryCtxRetain({index})")
    return context.value or 0


@contextlib.contextmanager
def current(context: int) -> Iterator[None]:
    """Make a context current on this thread for a while, and allow work that a stream capture on it would forbid (loading
    a module allocates)."""
    cuda, mode, previous = library(), _I(CAPTURE_MODE_RELAXED), _P()
    check(cuda.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
    try:
        check(cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
        try:
            yield
        finally:
            check(cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    finally:
        check(cuda.cuCtxPopCurrent_v2(ctypes.byref(previous)), "cuCtxPopCurrent")


def load_module(image: bytes, name: str) -> int:
    """Load a cubin or PTX (NUL-terminated) into the current context.

    Raises:
        Refused: the image is invalid, for another card, or newer than the driver.
        CudaError: the driver failed for a reason that is not the image's.
    """
    module, log = _P(), ctypes.create_string_buffer(8192)
    options = (_I * 2)(JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES)
    values = (_P * 2)(ctypes.addressof(log), len(log))
    code = library().cuModuleLoadDataEx(ctypes.byref(module), image, 2, options, values)
    if code in IMAGE_REFUSED:
        said = log.value.decode(errors="replace").strip()
        raise Refused(describe(code) + (f"; {said}" if said else ""))
    check(code, f"cuModuleLoadDataEx({name})")
    return module.value or 0


def get_function(module: int, symbol: str) -> int:
    """A kernel of a loaded module.

    Raises:
        Refused: the module has none of that name.
    """
    function = _P()
    code = library().cuModuleGetFunction(ctypes.byref(function), module, symbol.encode())
    if code == NOT_FOUND:
        raise Refused(f"no kernel {symbol}: {describe(code)}")
    check(code, f"cuModuleGetFunction({symbol})")
    return function.value or 0


def static_shared(function: int, symbol: str) -> int:
    """The static shared memory of a kernel, in bytes."""
    value = _I()
    check(library().cuFuncGetAttribute(ctypes.byref(value), SHARED_SIZE_BYTES, function), f"cuFuncGetAttribute({symbol})")
    return value.value


def allow_shared(function: int, symbol: str, size: int) -> None:
    """Let a kernel be launched with `size` bytes of dynamic shared memory; above 48 KiB that has to be asked for."""
    check(library().cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, size), f"cuFuncSetAttribute({symbol}, {size} bytes)")
