"""Compiles device code for the host, with the PTX primitives emulated lane by lane (tests/lanes)."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from stub import build

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
SHARED = re.compile(r"extern __shared__ __align__\(128\) u8 (\w+)\[\];")
LIBRARIES = ROOT / "build" / "lanes"  # a dozen, a quarter of a minute each: one process compiles for all, and for runs to come
KEPT = 32


def compiled(arch: int, folder: Path, sources: tuple[str, ...], functions: str) -> ctypes.CDLL:
    """Device code for the host: `functions`, in the namespace of the `sources` that they use. `folder` is for what the compiler reads."""
    shutil.copytree(ROOT / "tests" / "lanes", folder, dirs_exist_ok=True)
    for part in ("block", "common", "kernel", "layout"):
        (folder / part).mkdir()
        for source in (ROOT / "csrc" / part).glob("*.cuh"):
            (folder / part / source.name).write_text(SHARED.sub(r"u8* \1 = dynamic_shared;", source.read_text()))
    types = folder / "csrc" / "ptx" / "types.cuh"
    types.parent.mkdir(parents=True)
    shutil.copy(ROOT / "csrc" / "ptx" / "types.cuh", types)
    (folder / build.CONSTANTS).parent.mkdir()
    (folder / build.CONSTANTS).write_text(build.constants())
    includes = "".join(f'#include "{name}"\n' for name in ("block.h", *sources))
    (folder / "unit.cpp").write_text(f"{includes}namespace sage {{\n{functions}}}\n")
    options = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", f"-DARCH={arch}", "-I.")
    return ctypes.CDLL(str(_library(folder, options)))


def _library(folder: Path, options: tuple[str, ...]) -> Path:
    """unit.cpp of the folder, compiled unless a library of the same files, options and compiler is there."""
    import fcntl

    digest = hashlib.sha256(repr((options, _version())).encode())
    for path in sorted(filter(Path.is_file, folder.rglob("*"))):
        digest.update(repr((path.relative_to(folder).as_posix(), path.read_bytes())).encode())
    LIBRARIES.mkdir(parents=True, exist_ok=True)
    library = LIBRARIES / f"{digest.hexdigest()[:32]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling it
        if library.exists():
            library.touch()
        else:
            part = library.with_suffix(".part")
            subprocess.run([COMPILER, *options, "unit.cpp", "-o", str(part)], cwd=folder, check=True)
            os.replace(part, library)
            for old in sorted(LIBRARIES.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT]:
                old.unlink(missing_ok=True)
                old.with_suffix(".lock").unlink(missing_ok=True)
    return library


@functools.cache
def _version() -> str:
    return subprocess.run([COMPILER, "--version"], check=True, capture_output=True, text=True).stdout
