"""Build the wheel of `sageattention-launcher`, the compiled launcher, for the running Python and system.

    python csrc/tools/launcher_wheel.py [--out DIR]        needs setuptools, pybind11 and a C++17 compiler; no CUDA
    python csrc/tools/launcher_wheel.py --project DIR      only writes the project, for another builder such as cibuildwheel

pybind11 has no stable ABI, so there is one wheel per Python and system. Its version is the package's: `sageattention` takes
no other. On Linux the wheel gets the manylinux tag of the newest glibc symbol it uses; build it on an old system for an old tag.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[1]
PACKAGE = CSRC.parent / "sageattention"

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77", "pybind11>=2.13"]
build-backend = "setuptools.build_meta"

[project]
name = "sageattention-launcher"
version = "{version}"
description = "{summary}"
license = "Apache-2.0"
requires-python = ">=3.10"
"""

# Run in the project's folder; everything it needs is in its arguments.
SETUP = """\
import sys
import pybind11
from setuptools import Extension, setup

version = {version!r}
if sys.platform == "win32":
    flags, link, libraries = ["/O2", "/std:c++17", "/EHsc"], [], []
else:
    flags = ["-O2", "-std=c++17", "-fvisibility=hidden", "-g0"]
    link, libraries = ["-s"], ["dl"]
setup(
    ext_modules=[
        Extension(
            "sageattention_launcher",
            ["launcher.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[("SAGEATTENTION_VERSION", '"' + version + '"')],
            extra_compile_args=flags,
            extra_link_args=link,
            libraries=libraries,
            language="c++",
        )
    ],
    py_modules=[],
)
"""


class LauncherError(Exception):
    """The wheel could not be built; the message is the compiler's."""


def version() -> str:
    """The package's version, read without importing it."""
    found = re.search(r'^__version__ = "([^"]+)"', (PACKAGE / "_version.py").read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise LauncherError(f"{PACKAGE / '_version.py'} has no __version__")
    return found[1]


def summary() -> str:
    return f"Compiled kernel launcher of sageattention {version()}: saves some microseconds per call. Optional."


def manylinux(module: bytes) -> str:
    """The platform tag of a Linux module by the newest glibc symbol version it names (PEP 600), without the machine."""
    versions = [(int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", module)]
    major, minor = max([*versions, (2, 17)])
    return f"manylinux_{major}_{minor}"


def _setup(project: Path, *arguments: str) -> str:
    # Fixed times make the wheel's bytes depend on the compiler alone.
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1577836800"}
    command = [sys.executable, "setup.py", "-q", *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise LauncherError(f"{done.stdout}\n{done.stderr}".strip())
    return done.stdout


def write_project(folder: Path) -> None:
    """A folder that any builder of wheels takes: the source, pyproject.toml and setup.py."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(CSRC / "launcher.cpp", folder)
    (folder / "pyproject.toml").write_text(PYPROJECT.format(version=version(), summary=summary()), encoding="utf-8")
    (folder / "setup.py").write_text(SETUP.format(version=version()), encoding="utf-8")


def build(out: Path) -> Path:
    """Build the wheel into `out` and return its path.

    Raises:
        LauncherError: setuptools, pybind11 or a compiler is missing, or the compiler failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        project, fresh = Path(folder), Path(folder) / "dist"
        write_project(project)
        _setup(project, "build_ext")
        tag = []
        if sys.platform.startswith("linux"):
            module = next(project.glob("build/lib*/*.so"))
            tag = ["--plat-name", f"{manylinux(module.read_bytes())}_{os.uname().machine}"]
        _setup(project, "bdist_wheel", "--dist-dir", str(fresh), *tag)
        wheel = next(fresh.glob("*.whl"))
        return Path(shutil.move(wheel, out / wheel.name))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the wheel of sageattention-launcher.")
    parser.add_argument("--out", type=Path, default=CSRC.parent / "dist", help="folder for the wheel (dist)")
    parser.add_argument("--project", type=Path, help="write the project into this folder, and build nothing")
    args = parser.parse_args(argv)
    try:
        if args.project:
            write_project(args.project)
        else:
            print(build(args.out))
    except LauncherError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
