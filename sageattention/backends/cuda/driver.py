"""Kernels on devices: loads an image once per device when it is first wanted, and launches.

    kernel = driver.kernel(device, image, symbol, variant)                       # cached
    driver.launch(device, stream, ((kernel, x, y, z, params, overlap), …))       # on the caller's stream

Devices are counted as torch counts them. Work happens in the device's primary context, which is torch's, from any thread.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass, field

from ...device import libcuda
from ...errors import CudaError, KernelMissing
from ...kernels import store
from ...kernels.architectures import ARCHITECTURES, PTX_DRIVER
from ...kernels.binaries import Entry, Image
from ...kernels.store import Unusable
from . import launcher
from .launcher import Kernel, Launch, Launcher


@dataclass
class Device:
    """A card in use: what it is, and what has been loaded onto it."""

    index: int
    name: str
    arch: int  # 10 · major + minor
    shared: int  # bytes of shared memory a block can have
    context: int
    launcher: str  # "compiled" or "ctypes"
    launch: Launcher
    lock: threading.RLock = field(default_factory=threading.RLock)
    modules: dict[str, int] = field(default_factory=dict)  # image path → module
    refused: dict[str, str] = field(default_factory=dict)  # image path → why, so that a bad file is read once
    kernels: dict[tuple[str, str], Kernel] = field(default_factory=dict)  # (image path, symbol)


_devices: dict[int, Device] = {}
_devices_lock = threading.Lock()


def device(index: int) -> Device:
    """The card of that index; opens the driver and retains the card's primary context when it is first asked for.

    Raises:
        libcuda.NoDriver: there is no usable driver.
        CudaError: the driver fails.
    """
    known = _devices.get(index)
    if known is not None:
        return known
    with _devices_lock:
        if index not in _devices:
            major, minor = (libcuda.device_attribute(index, a) for a in (libcuda.CAPABILITY_MAJOR, libcuda.CAPABILITY_MINOR))
            shared = libcuda.device_attribute(index, libcuda.SHARED_MEMORY_PER_BLOCK_OPTIN)
            name, launch = launcher.choose()
            _devices[index] = Device(
                index, libcuda.device_name(index), 10 * major + minor, shared, libcuda.primary_context(index), name, launch
            )
        return _devices[index]


def kernel(index: int, image: Image, symbol: str, variant: str) -> Kernel:
    """A kernel ready to be launched on device `index`. Loads its image when it is first wanted there.

    Args:
        image: what `binaries.select` chose for the device.
        symbol: one of its entries.
        variant: whom an error is about.

    Raises:
        KernelMissing: there is no driver, it is too old for the image, the image is missing, damaged or refused, the card has
            too little shared memory, or the driver fails at loading it. Nothing has run and nothing stays half loaded; another
            variant can be tried.
    """
    known = _devices.get(index)
    found = known and known.kernels.get((image.path, symbol))
    if found:
        return found
    try:
        card = device(index)
        with card.lock:
            if (image.path, symbol) not in card.kernels:
                card.kernels[image.path, symbol] = _load(card, image, image.entry(symbol))
            return card.kernels[image.path, symbol]
    except (libcuda.NoDriver, Unusable, CudaError) as error:
        raise KernelMissing(variant, str(error)) from error


def launch(index: int, stream: int, launches: tuple[Launch, ...]) -> None:
    """Issue launches, in order, on a stream of device `index`.

    Args:
        stream: the stream's handle, as `torch.cuda.current_stream().cuda_stream`.
        launches: tuples (kernel, grid x, grid y, grid z, parameter bytes, overlap); see `launcher.Launch`.

    Raises:
        CudaError: a driver call failed; it names the call, the error and the launch. Launches before it were issued.
        ValueError: the parameters are not of the kernel's size.
    """
    card = _devices[index]  # there is one: a kernel of it has been loaded
    failure = card.launch(card.context, stream, launches)
    if failure is not None:
        raise _launch_error(card, stream, launches, failure)


def _launch_error(card: Device, stream: int, launches: tuple[Launch, ...], failure: launcher.Failure) -> CudaError:
    number, call, code = failure
    kernel, x, y, z, params, overlap = launches[number]
    return CudaError(
        f"{call}: {libcuda.describe(code)}; launching {kernel.symbol} (grid {x}x{y}x{z}, block {kernel.threads}, "
        f"{kernel.smem} bytes of dynamic shared memory, {len(params)} bytes of parameters{', overlapping' if overlap else ''}), "
        f"launch {number + 1} of {len(launches)} on stream {stream:#x} of {_named(card)}. "
        "The error may stem from earlier work on the device."
    )


def _load(card: Device, image: Image, entry: Entry) -> Kernel:
    known, path = store.record(image, entry), store.KERNELS / image.path
    for key, value in (("threads", entry.threads), ("params", ctypes.sizeof(entry.params))):
        if known[key] != value:
            raise Unusable(
                f"{path} is of another version: the {key} of {entry.symbol} is {known[key]}, this version's is {value}; {store.remedy()}"
            )
    smem = known["smem_dynamic"]
    _check_shared(card, image, entry, smem + (known["smem_static"] or 0))
    with libcuda.current(card.context):
        module = _module(card, image)
        try:
            handle = libcuda.get_function(module, entry.symbol)
        except libcuda.Refused as error:
            raise Unusable(f"{path}: {error}; {store.remedy()}") from error
        if known["smem_static"] is None:  # PTX: the driver has only now compiled it
            _check_shared(card, image, entry, smem + libcuda.static_shared(handle, entry.symbol))
        if smem:
            libcuda.allow_shared(handle, entry.symbol, smem)
    overlap = card.arch >= 90 and libcuda.cuda_version() >= libcuda.GRAPHS_WITH_OVERLAP
    return Kernel(handle, entry.threads, smem, known["params"], overlap, entry.symbol, ctypes.c_void_p(handle))


def _check_shared(card: Device, image: Image, entry: Entry, need: int) -> None:
    if need > card.shared:
        raise Unusable(
            f"{entry.symbol} of {store.KERNELS / image.path} needs {need} bytes of shared memory per block, {_named(card)} "
            f"has {card.shared}; choose another variant"
        )


def _module(card: Device, image: Image) -> int:
    """The image's module on a card, loaded once. The card's context is current."""
    if image.path in card.modules:
        return card.modules[image.path]
    if image.path in card.refused:
        raise Unusable(card.refused[image.path])
    try:
        _check_driver(image)
        try:
            module = libcuda.load_module(store.read(image), image.path)
        except libcuda.Refused as error:
            raise Unusable(
                f"{store.KERNELS / image.path} is refused for {_named(card)} by its driver ({libcuda.driver_version()}): {error}; "
                "update the driver, or choose another variant"
            ) from error
    except Unusable as error:
        card.refused[image.path] = str(error)
        raise
    card.modules[image.path] = module
    return module


def _check_driver(image: Image) -> None:
    version, branch = PTX_DRIVER if image.is_ptx else ARCHITECTURES[image.capability].driver
    if libcuda.cuda_version() < version:
        raise Unusable(
            f"{store.KERNELS / image.path} needs an NVIDIA driver >= {branch} (CUDA {version // 1000}.{version % 1000 // 10}), "
            f"this machine's is {libcuda.driver_version()}; update the driver"
        )


def _named(card: Device) -> str:
    return f"device {card.index} ({card.name}, sm_{card.arch})"
