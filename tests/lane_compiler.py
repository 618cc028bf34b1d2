"""Compiles device code for the host, with the PTX primitives emulated lane by lane (tests/lanes)."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

from stub import build

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
SHARED = re.compile(r"extern __shared__ __align__\(128\) u8 (\w+)\[\];")


def compiled(arch: int, folder: Path, sources: tuple[str, ...], functions: str) -> ctypes.CDLL:
    """Device code for the host: `functions`, in the namespace of the `sources` that they use."""
    shutil.copytree(ROOT / "tests" / "lanes", folder, dirs_exist_ok=True)
    for part in ("block", "common", "kernel", "layout"):
        (folder / part).mkdir()
        for source in (ROOT / "csrc" / part).glob("*.cuh"):
            (folder / part / source.name).write_text(SHARED.sub(r"u8* \1 = dynamic_shared;", source.read_text()))
    (folder / build.CONSTANTS).parent.mkdir()
    (folder / build.CONSTANTS).write_text(build.constants())
    unit, library = folder / "unit.cpp", folder / "lanes.so"
    includes = "".join(f'#include "{name}"\n' for name in ("block.h", *sources))
    unit.write_text(f"{includes}namespace sage {{\n{functions}}}\n")
    options = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", f"-DARCH={arch}", f"-I{folder}", f"-I{ROOT}")
    subprocess.run([COMPILER, *options, str(unit), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
