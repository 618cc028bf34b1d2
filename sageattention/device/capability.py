"""What the machine has, as plain data: the second input of `plan()`. Looked up once per device, never at import."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import NamedTuple

from ..errors import CudaError
from . import libcuda


class Capability(NamedTuple):
    """A device as the planner sees it. `arch` is 10·major + minor of its compute capability, 0 where it has none."""

    device: str  # "cuda" or "cpu" (or any other torch device type)
    arch: int = 0
    multiprocessors: int = 0
    triton: str = "none"  # "native", "interpret" (TRITON_INTERPRET=1), "broken" or "none"
    name: str = ""


def triton_mode() -> str:
    """How Triton would run here: "native", "interpret", "broken" (installed, but it can't be imported) or "none"."""
    try:
        found = importlib.util.find_spec("triton")
    except ValueError:  # somebody's empty stand-in lies in sys.modules
        found = None
    if found is None:
        return "none"
    if triton_error():
        return "broken"
    return "interpret" if os.environ.get("TRITON_INTERPRET") == "1" else "native"


@functools.cache
def triton_error() -> str:
    """Why the Triton that is installed can't be imported; "" where it can. Tried once: a failing import takes its time."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton raises whatever its extension does; every caller tells it
        return f"{type(error).__name__}: {error}"
    return ""


@functools.cache
def torch_without_cuda() -> str:
    """Where torch is a build without CUDA on a machine with an NVIDIA card: a sentence that says so, and the remedy; "" elsewhere."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return ""
    try:
        card = libcuda.device_name(0)
    except (libcuda.NoDriver, CudaError):
        return ""
    return f"torch {torch.__version__} is a build without CUDA, though there is an NVIDIA card, {card}: install a CUDA build of torch"


@functools.cache
def of_device(device: str, index: int) -> Capability:
    """The capability of a torch device. For CUDA this initialises CUDA; for any other device it does not."""
    if device != "cuda":
        return Capability(device, triton=triton_mode(), name=device)
    import torch

    if torch.version.hip:  # ROCm builds call their devices "cuda"; our kernels are for NVIDIA's
        return Capability("rocm", name=torch.cuda.get_device_name(index))
    properties = torch.cuda.get_device_properties(index)
    if "[ZLUDA]" in properties.name:  # an AMD card behind a translation of CUDA, which does not run our machine code
        return Capability("zluda", name=properties.name)
    return Capability("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count, triton_mode(), properties.name)
