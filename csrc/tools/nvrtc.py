"""NVRTC through ctypes: CUDA C++ text to machine code or PTX, with the assembler's report. No nvcc, no GPU.

The compiler and the CUDA headers come from two PyPI packages of the running interpreter; their versions are fixed, because
the images are reproducible only with one compiler.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

COMPILER = ("nvidia-cuda-nvrtc-cu12", "12.8.93")
HEADERS = ("nvidia-cuda-runtime-cu12", "12.8.90")
VERSION = f"NVRTC {COMPILER[1]}, headers {HEADERS[1]}"

_LIBRARY = "nvrtc64_120_0.dll" if os.name == "nt" else "libnvrtc.so.12"
_BUILTINS = "nvrtc-builtins64_128.dll" if os.name == "nt" else "libnvrtc-builtins.so.12.8"


class CompileError(Exception):
    """The compiler is not there, or it refused a source; the message is its log."""


@dataclass(frozen=True)
class Usage:
    """What one kernel takes of a multiprocessor: registers per thread, the rest in bytes."""

    registers: int
    stack: int  # local memory per thread: arrays that did not fit registers, and spilled values
    spills: int  # bytes stored and loaded by spill code
    smem: int  # static shared memory per block


def _locate(package: tuple[str, str], file: str) -> Path:
    """A file of an installed PyPI package, found by its name alone."""
    name, version = package
    remedy = f"pip install {name}=={version}"
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise CompileError(f"{name} is not installed in {sys.prefix}: {remedy}") from None
    if distribution.version != version:
        raise CompileError(f"{name} is {distribution.version}, the images are built with {version}: {remedy}")
    for entry in distribution.files or ():
        if entry.name == file:
            path = Path(str(distribution.locate_file(entry))).resolve()
            if path.is_file():
                return path
    raise CompileError(f"{name} {version} holds no {file}: reinstall it ({remedy} --force-reinstall)")


@functools.cache
def headers() -> Path:
    """The folder of the CUDA headers (cuda_fp16.h and its neighbours)."""
    return _locate(HEADERS, "cuda_fp16.h").parent


@functools.cache
def _library() -> ctypes.CDLL:
    path = _locate(COMPILER, _LIBRARY)
    if os.name == "nt":
        os.add_dll_directory(str(path.parent))
    # Its own search for the built-in headers does not look beside it on every system, so they are loaded first.
    ctypes.CDLL(str(_locate(COMPILER, _BUILTINS)))
    library = ctypes.CDLL(str(path))
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return library


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    """nvrtcGet{what} into a buffer of the size that nvrtcGet{what}Size tells."""
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), f"nvrtcGet{what}Size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer), f"nvrtcGet{what}")
    return buffer.raw


def _check(code: int, call: str) -> None:
    if code:
        raise CompileError(f"{call}: {_library().nvrtcGetErrorString(code).decode()} ({code})")


def compile_text(
    text: str, name: str, arch: str, options: list[str], generated: dict[str, str] | None = None
) -> tuple[bytes, dict[str, Usage], str]:
    """Compile one translation unit.

    Args:
        text: CUDA C++.
        name: what messages call it; fixed per image, so that it can't make two builds differ.
        arch: "sm_80" gives a cubin, "compute_80" gives PTX.
        options: for NVRTC, beyond the architecture and the CUDA headers.
        generated: headers that are no files, by the names under which the sources include them.

    Returns:
        The image, each kernel's usage by symbol (empty for PTX, which no assembler has seen), and the warnings.

    Raises:
        CompileError: with NVRTC's log.
    """
    library, program, ptx = _library(), ctypes.c_void_p(), arch.startswith("compute_")
    flags = [f"--gpu-architecture={arch}", *options, f"--include-path={headers()}"]
    if not ptx:
        flags.append("--ptxas-options=-v")
    included = generated or {}
    names, texts = ((ctypes.c_char_p * len(included))(*(x.encode() for x in part)) for part in (included.keys(), included.values()))
    created = library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), len(names), texts, names)
    _check(created, "nvrtcCreateProgram")
    try:
        code = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags)))
        log = _text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            raise CompileError(f"{name} for {arch}: {library.nvrtcGetErrorString(code).decode()}\n{log}")
        image = _text(program, "PTX").rstrip(b"\0") if ptx else _text(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    # C7510 and its neighbours, information to the assembler: wgmma serialised, which costs its overlap with everything
    return image, usage(log), "\n".join(line for line in log.splitlines() if "warning" in line.lower() or "(C75" in line)


_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SMEM = re.compile(r"(\d+) bytes smem")


def usage(log: str) -> dict[str, Usage]:
    """Read the assembler's `-v` report: for each entry its own lines, and those of functions it calls, follow its name."""
    found: dict[str, Usage] = {}
    for block in re.split(r"(?=ptxas info\s*: Compiling entry function)", log):
        entry, used = _ENTRY.search(block), _USED.search(block)
        if entry and used:
            frames = [tuple(map(int, m.groups())) for m in _STACK.finditer(block)]
            smem = _SMEM.search(block)
            found[entry[1]] = Usage(int(used[1]), sum(f[0] for f in frames), sum(f[1] + f[2] for f in frames), int(smem[1]) if smem else 0)
    return found
