"""The stub driver and a demo image table for the tests of build, loader and launchers: no GPU, no CUDA.

`demo/kernels` holds the demo images as built from `demo/csrc`, for the tests on a GPU; `python tests/stub.py` builds them again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent / "csrc/tools"
DEMO_CSRC, DEMO_KERNELS = HERE / "demo/csrc", HERE / "demo/kernels"
sys.path[:0] = [str(TOOLS), str(HERE.parent)]

import build  # noqa: E402
import launcher_wheel  # noqa: E402
import nvrtc  # noqa: E402

from sageattention.kernels.architectures import TARGETS  # noqa: E402
from sageattention.kernels.binaries import Entry, Image  # noqa: E402


class Pair(ctypes.Structure):
    """As demo/csrc/sub/params.cuh has it."""

    _fields_ = (("data", ctypes.c_uint64), ("stride", ctypes.c_int64))


class DemoParams(ctypes.Structure):
    """As demo/csrc/sub/params.cuh has it."""

    _fields_ = (
        ("x", Pair),
        ("y", ctypes.c_uint64),
        ("n", ctypes.c_int32),
        ("factor", ctypes.c_float),
    )


ENTRIES = (
    Entry("demo_double", "scale<2>", DemoParams, threads=256, smem="1024"),
    Entry("demo_triple", "scale<3>", DemoParams, threads=128, min_blocks=2, smem="96 * 1024"),
)
TABLE = tuple(Image("demo", arch, "demo.cuh", ENTRIES) for arch in TARGETS)


def by_path(path: str) -> Image:
    return next(i for i in TABLE if i.path == path)


class Launch(ctypes.Structure):
    """What the stub records of a launch."""

    _fields_ = (
        ("function", ctypes.c_uint64), ("context", ctypes.c_uint64), ("stream", ctypes.c_uint64), ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3), ("smem", ctypes.c_uint), ("overlap", ctypes.c_int), ("params", ctypes.c_ubyte * 256),
    )  # fmt: skip


class Stub:
    """The stub driver library's settings and record."""

    def __init__(self, path: Path):
        self.path = str(path)
        self.library = ctypes.CDLL(self.path)
        self.library.stub_set_current.argtypes = (ctypes.c_void_p,)

    def get(self, name: str) -> int:
        kind = ctypes.c_uint64 if name == "load_context" else ctypes.c_int
        return kind.in_dll(self.library, f"stub_{name}").value

    def set(self, **values: int) -> None:
        for name, value in values.items():
            ctypes.c_int.in_dll(self.library, f"stub_{name}").value = value

    def capability(self, index: int, arch: int) -> None:
        (ctypes.c_int * 2).in_dll(self.library, "stub_major")[index] = arch // 10
        (ctypes.c_int * 2).in_dll(self.library, "stub_minor")[index] = arch % 10

    def image(self) -> bytes:
        return bytes((ctypes.c_char * 16).in_dll(self.library, "stub_image"))

    def enter(self, context: int) -> None:
        """Make a context current on this thread, as a runtime would have."""
        self.library.stub_set_current(context)

    def current(self) -> int:
        """The context that is current on this thread."""
        context = ctypes.c_void_p()
        self.library.cuCtxGetCurrent(ctypes.byref(context))
        return context.value or 0

    def launches(self) -> list[Launch]:
        return list((Launch * 64).in_dll(self.library, "stub_launches"))[: self.get("launched")]

    def reset(self) -> None:
        self.set(version=12080, init=0, load=0, launch=0, fail_at=-1, shared=232448, static=0, params=ctypes.sizeof(DemoParams))
        self.set(launched=0, loaded=0, allowed=0, pushed=0, popped=0, relaxed=0)
        for index in (0, 1):
            self.capability(index, 90)
        self.enter(0)


def build_stub(folder: Path) -> Stub:
    """Compile the stub driver, or take the one that STUB_DRIVER names; skips the test, visibly, where there is no C compiler."""
    path = folder / ("nvcuda.dll" if sys.platform == "win32" else "libstubcuda.so")
    ready = os.environ.get("STUB_DRIVER")
    if ready:
        return Stub(Path(shutil.copy(ready, path)))
    gcc = shutil.which("gcc") or shutil.which("cc")
    if sys.platform == "win32":
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-windows-gnu"]
        compiler = zig if importlib.util.find_spec("ziglang") else None
    else:
        compiler = [gcc, "-fPIC"] if gcc else None
    if compiler is None:
        pytest.skip("no C compiler: the stub driver can't be built")
    subprocess.run([*compiler, "-shared", "-O1", "-o", str(path), str(HERE / "stub_driver.c")], check=True)
    return Stub(path)


def build_launcher(folder: Path) -> Path:
    """Build the compiled launcher's wheel, or take the one that STUB_LAUNCHER names; skips the test, visibly, where a tool is missing."""
    ready = os.environ.get("STUB_LAUNCHER")
    if ready:
        return Path(ready)
    tools = ("pybind11", "ziglang") if sys.platform == "win32" else ("pybind11", "setuptools")
    missing = [tool for tool in tools if importlib.util.find_spec(tool) is None]
    if sys.platform != "win32" and not (shutil.which("g++") or shutil.which("c++")):
        missing.append("a C++ compiler")
    if missing:
        pytest.skip(f"the compiled launcher is not tested, there is no {', '.join(missing)}")
    if sys.platform == "win32":
        from installing import build as wheels

        return wheels.build_launcher(sys.executable, "win_amd64", folder)
    return launcher_wheel.build(folder)


def install_images(kernels: Path, table: tuple[Image, ...] = TABLE) -> None:
    """Write a kernels folder as the build does, with made-up image bytes."""
    records = {}
    for image in table:
        binary = fake_binary(image)
        usage = {} if image.is_ptx else {e.symbol: nvrtc.Usage(32, 0, 0, 256) for e in image.entries}
        records[image.path] = build.record(image, binary, usage, {"demo_double": 1024, "demo_triple": 98304}, "0" * 64)
        build._replace(kernels / image.path, build.pack(binary))
    build.write_manifest(records, kernels)


def fake_binary(image: Image) -> bytes:
    return f"{image.arch}:{image.name}".encode().ljust(64, b".") + bytes(range(256)) * 16


if __name__ == "__main__":
    build.build(TABLE, list(TABLE), 2, DEMO_KERNELS, DEMO_CSRC)
