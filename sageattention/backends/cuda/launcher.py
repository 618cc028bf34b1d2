"""Two ways to hand launches to the driver: the compiled module `sageattention_launcher`, and ctypes, which always works.

A launcher is a function `launch(context, stream, launches)`. `context` is the device's primary context (made current for the
call where this thread is in another one, and put back), `stream` the caller's stream handle, `launches` a tuple of `Launch`
tuples, issued in order. It returns None, or for the first launch that failed (its index, the driver call, the CUresult); those
after it are not issued.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

from ..._version import __version__
from ...device import libcuda
from ...errors import Unsupported

CHOICE = "SAGEATTENTION_LAUNCHER"
MODULE, DISTRIBUTION = "sageattention_launcher", "sageattention-launcher"

_log = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """A loaded kernel of one device. The compiled launcher reads the first five fields by position."""

    handle: int  # CUfunction
    threads: int  # per block
    smem: int  # dynamic shared memory, bytes
    params: int  # size of its parameter struct, bytes
    overlap: bool  # whether the device can start it before the launch ahead of it has ended (compute capability ≥ 9.0)
    symbol: str
    pointer: ctypes.c_void_p  # `handle` as the ctypes launcher passes it


# (kernel, grid x, grid y, grid z, the parameter struct's bytes, overlap). `overlap` asks for programmatic dependent launch:
# the kernel may start early and itself waits (griddepcontrol.wait) before it reads what the launch ahead of it writes.
Launch = tuple[Kernel, int, int, int, bytes, bool]
Failure = tuple[int, str, int]
Launcher = Callable[[int, int, tuple[Launch, ...]], Failure | None]

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID, cuda.h


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, with the one member of its 64-byte union that is used."""

    _fields_ = (("id", ctypes.c_int), ("_pad", ctypes.c_int), ("value", ctypes.c_int), ("_rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class _Frame(threading.local):
    """What a launch points the driver at; one per thread, made once, because the driver is called without the GIL."""

    def __init__(self) -> None:
        self.params = (ctypes.c_char_p * 1)()  # kernelParams: one pointer, to the bytes themselves
        self.stream, self.current = ctypes.c_void_p(), ctypes.c_void_p()
        self.attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self.config = _Config(block=(1, 1, 1), attributes=ctypes.pointer(self.attribute), count=1)
        self.current_ref, self.config_ref = ctypes.byref(self.current), ctypes.byref(self.config)


_frame = _Frame()


@functools.cache
def _calls() -> ctypes.CDLL:
    """The driver's calls without declared argument types. Declaring them doubles the cost of a launch (1.8 against 0.7 µs with
    a driver that does nothing), so every pointer here is passed as a ctypes object; plain integers are C ints."""
    libcuda.library()  # initialises the driver, or says why it can't
    return ctypes.CDLL(libcuda.LIBRARY)


def launch_ctypes(context: int, stream: int, launches: tuple[Launch, ...]) -> Failure | None:
    """The launcher that needs nothing compiled."""
    cuda, frame = _calls(), _frame
    code = cuda.cuCtxGetCurrent(frame.current_ref)
    if code:
        return 0, "cuCtxGetCurrent", code
    foreign = frame.current.value != context
    if foreign:
        code = cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(context))
        if code:
            return 0, "cuCtxPushCurrent", code
    failure = None
    try:
        failure = _issue(cuda, frame, stream, launches)
    finally:
        if foreign:
            code = cuda.cuCtxPopCurrent_v2(frame.current_ref)
            if code and failure is None:
                failure = len(launches) - 1, "cuCtxPopCurrent", code
    return failure


def _issue(cuda: ctypes.CDLL, frame: _Frame, stream: int, launches: tuple[Launch, ...]) -> Failure | None:
    plain, params, on = cuda.cuLaunchKernel, frame.params, frame.stream
    on.value = stream
    for index, (kernel, x, y, z, data, overlap) in enumerate(launches):
        _, threads, smem, size, able, symbol, function = kernel
        if len(data) != size:
            raise ValueError(f"{symbol} takes {size} bytes of parameters, got {len(data)}")
        params[0] = data
        if overlap and able:
            config = frame.config
            config.grid[:] = (x, y, z)
            config.block[0], config.smem, config.stream = threads, smem, stream
            code = cuda.cuLaunchKernelEx(frame.config_ref, function, params, None)
            if code:
                return index, "cuLaunchKernelEx", code
        else:
            code = plain(function, x, y, z, threads, 1, 1, smem, on, params, None)
            if code:
                return index, "cuLaunchKernel", code
    return None


@functools.cache
def compiled() -> Launcher | None:
    """The compiled launcher, or None where it is absent or can't be used; the latter is told once, with the remedy."""
    remedy = f"kernels are launched through ctypes, some microseconds slower; pip install {DISTRIBUTION}=={__version__}"
    try:
        module = importlib.import_module(MODULE)
    except ModuleNotFoundError as error:
        if error.name != MODULE:
            _log.warning("%s can't be imported (%s): %s", MODULE, error, remedy)
        return None
    except ImportError as error:  # built for another Python, or truncated
        _log.warning("%s can't be imported (%s): %s", MODULE, error, remedy)
        return None
    version = getattr(module, "__version__", "unknown")
    if version != __version__:
        where = getattr(module, "__file__", MODULE)
        _log.warning("%s is version %s, sageattention is %s: %s", where, version, __version__, remedy)
        return None
    libcuda.library()  # initialises the driver, which the module then finds already loaded
    failed = module.open(libcuda.LIBRARY)
    if failed:
        _log.warning("%s: %s: %s", MODULE, failed, remedy)
        return None
    return module.launch


def choose() -> tuple[str, Launcher]:
    """The launcher to use, by name: the compiled one where it can be had, unless SAGEATTENTION_LAUNCHER says "ctypes".

    Raises:
        Unsupported: the variable holds something else than "auto", "ctypes" or "compiled", or asks for a compiled one that
            can't be had.
    """
    asked = os.environ.get(CHOICE, "").strip() or "auto"
    if asked not in ("auto", "ctypes", "compiled"):
        raise Unsupported(CHOICE, f"the environment variable holds {asked!r}, accepted are auto, ctypes and compiled")
    launcher = None if asked == "ctypes" else compiled()
    if launcher is not None:
        return "compiled", launcher
    if asked == "compiled":
        raise Unsupported(CHOICE, f"{asked!r} is asked for, but there is no usable {DISTRIBUTION} in this Python")
    return "ctypes", launch_ctypes
