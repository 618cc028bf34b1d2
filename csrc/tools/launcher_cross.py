"""Compile the launcher for another Python and another system, by zig: its wheels are built on one Linux machine.

A target is a wheel's platform, `manylinux_x86_64`, `manylinux_aarch64` or `win_amd64`. Only headers of the Python are needed, from any
installation of that minor version for Linux: where they depend on the system is pyconfig.h, which is written here for Windows. (Linux on
aarch64 differs in nothing that this module uses: all is as wide as on x86-64.) zig's libc++ is linked in; on Linux the module asks for an
old glibc only, on Windows for the universal C runtime and the Python's DLL. Nothing depends on the time or the place: the same sources
and tools give the same bytes.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
MODULE = "sageattention_launcher"
EPOCH = 1577836800  # 2020-01-01, the time of everything in our wheels
GLIBC = "2.28"  # of every system with a Python 3.10 that is still maintained
TARGETS = {
    "manylinux_x86_64": f"x86_64-linux-gnu.{GLIBC}",
    "manylinux_aarch64": f"aarch64-linux-gnu.{GLIBC}",
    "win_amd64": "x86_64-windows-gnu",
}

# What python.org's pyconfig.h for 64-bit Windows says, as far as headers and pybind11 read it; CPython's PC/pyconfig.h.in is the source.
_SIZES = {8: ("VOID_P", "SIZE_T", "TIME_T", "FPOS_T", "LONG_LONG", "DOUBLE"), 4: ("OFF_T", "INT", "LONG", "FLOAT"), 2: ("WCHAR_T", "SHORT")}
_FLAGS = (
    "MS_WINDOWS MS_WIN32 MS_WIN64 NT_THREADS HAVE_DECLSPEC_DLL HAVE_SSIZE_T HAVE_UINTPTR_T HAVE_INTPTR_T HAVE_DYNAMIC_LOADING "
    "HAVE_STDDEF_H HAVE_SYS_TYPES_H HAVE_SYS_STAT_H HAVE_WCHAR_H HAVE_ERRNO_H STDC_HEADERS Py_ENABLE_SHARED WITH_DOC_STRINGS WITH_PYMALLOC"
)
WINDOWS_PYCONFIG = "\n".join(
    ["#include <io.h>", "#include <stdio.h>", '#define PLATFORM "win32"', "#define ALIGNOF_MAX_ALIGN_T 8"]
    + [f"#define {flag} 1" for flag in _FLAGS.split()]
    + [f"#define SIZEOF_{name} {size}" for size, names in _SIZES.items() for name in names]
)


class CrossError(Exception):
    """The launcher could not be compiled; the message is the compiler's."""


def file_name(python: tuple[int, int], target: str) -> str:
    """Of the extension module, as that Python looks for it."""
    tag = f"{python[0]}{python[1]}"
    if target == "win_amd64":
        return f"{MODULE}.cp{tag}-win_amd64.pyd"
    return f"{MODULE}.cpython-{tag}-{target.removeprefix('manylinux_')}-linux-gnu.so"


def compile_launcher(include: Path, python: tuple[int, int], target: str, version: str, pybind11: Path) -> bytes:
    """The extension module for that Python and target; `include` has the Python's headers, `pybind11` pybind11's.

    Raises:
        CrossError: zig is missing, or it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(include, work / "python")
        shutil.copy(CSRC / "launcher.cpp", work)
        flags = [
            "-O2",
            "-std=c++17",
            "-g0",
            "-fvisibility=hidden",
            f'-DSAGEATTENTION_VERSION="{version}"',
            "-I",
            "python",
            "-I",
            str(pybind11),
        ]
        flags += [f"-ffile-prefix-map={pybind11}=pybind11"]
        if target == "win_amd64":
            (work / "python" / "pyconfig.h").write_text(WINDOWS_PYCONFIG + "\n", encoding="ascii")
            _zig(work, "c++", "-target", TARGETS[target], *flags, "-c", "launcher.cpp", "-o", "launcher.o")
            library = f"python{python[0]}{python[1]}"
            (work / "python.def").write_text(
                f"LIBRARY {library}.dll\nEXPORTS\n" + "".join(f"{name}\n" for name in python_symbols((work / "launcher.o").read_bytes()))
            )
            _zig(work, "dlltool", "-d", "python.def", "-l", f"lib{library}.a", "-m", "i386:x86-64")
            link = ["launcher.o", "-L", ".", f"-l{library}"]
        else:
            flags.append("-fPIC")
            link = ["launcher.cpp", *flags, "-ldl"]
        _zig(work, "c++", "-target", TARGETS[target], *link, "-shared", "-s", "-o", "module")
        module = (work / "module").read_bytes()
    return with_fixed_time(module) if target == "win_amd64" else module


def with_fixed_time(module: bytes) -> bytes:
    """A DLL whose header has the wheels' time instead of the linker's."""
    at = struct.unpack_from("<I", module, 0x3C)[0] + 8
    return module[:at] + struct.pack("<I", EPOCH) + module[at + 4 :]


def _zig(folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise CrossError(f"zig {' '.join(arguments)}\n{done.stdout}\n{done.stderr}".strip())


def python_symbols(coff: bytes) -> list[str]:
    """Names that an object file for Windows (COFF) expects from the Python's DLL: what an import library has to hold."""
    table, count = struct.unpack_from("<II", coff, 8)
    strings, names, index = table + 18 * count, set(), 0
    while index < count:
        short, section, auxiliary = struct.unpack_from("<8s4xh3xB", coff, table + 18 * index)
        if section == 0:  # undefined
            start = strings + struct.unpack("<4xI", short)[0] if short[:4] == b"\0\0\0\0" else None
            name = (coff[start : coff.index(b"\0", start)] if start else short.rstrip(b"\0")).decode("ascii")
            names.add(name.removeprefix("__imp_"))
        index += 1 + auxiliary
    return sorted(name for name in names if re.match(r"_?Py", name))
