"""Build the launchers' wheels and the index: one command. (The package's own wheel is written by install.py, from the package.)

    python wheels/build.py [--out DIR] [--python PATH ...] [--target NAME ...] [--no-build] [--add DIR] [--mirror URL]
    python wheels/build.py --check          are the wheels here of this version, and is the index theirs?

All are compiled on one Linux machine, for Linux and Windows, by zig (csrc/tools/launcher_cross.py). That needs pybind11 and ziglang in
the running Python and, for each version of Python, an installation with headers. The same sources and tools give the same bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "tools")]

import launcher_cross  # noqa: E402
import launcher_wheel  # noqa: E402

from installer.wheel import write_wheel  # noqa: E402

FOLDER = Path(__file__).resolve().parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
LIMIT = 6 << 20  # bytes for all wheels of a release: they live in the repository


class BuildError(Exception):
    """A wheel could not be built; the message says what is missing."""


def project() -> dict:
    """pyproject.toml's table [project]."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def build_launcher(python: str, target: str, out: Path) -> Path:
    """sageattention_launcher-X.Y.Z for the version of a CPython with headers and one of `launcher_cross.TARGETS`.

    Raises:
        BuildError: a tool or the headers are missing, or the compiler failed.
    """
    missing = [name for name in ("pybind11", "ziglang") if importlib.util.find_spec(name) is None]
    if missing:
        raise BuildError(f"launcher wheels need {', '.join(missing)} in {sys.executable}: pip install {' '.join(missing)}")
    import pybind11

    minor, include = headers(python)
    try:
        version = launcher_wheel.version()
        module = launcher_cross.compile_launcher(include, (3, minor), target, version, Path(pybind11.get_include()))
    except (launcher_cross.CrossError, launcher_wheel.LauncherError, OSError) as error:
        raise BuildError(f"{python}: no launcher for {target}\n{error}") from error
    platform = target.replace("manylinux", launcher_wheel.manylinux(module)) if target.startswith("manylinux") else target
    metadata = (
        f"Metadata-Version: 2.4\nName: sageattention-launcher\nVersion: {version}\nSummary: {launcher_wheel.summary()}\n"
        "License-Expression: Apache-2.0\nRequires-Python: >=3.10\n"
    )
    files = {launcher_cross.file_name((3, minor), target): module}
    return write_wheel(out, metadata, f"cp3{minor}-cp3{minor}-{platform}", files, zipfile.ZIP_DEFLATED)


def headers(python: str) -> tuple[int, Path]:
    """The minor version of a CPython 3 and the folder of its headers.

    Raises:
        BuildError: it is none, or has no headers.
    """
    probe = "import sysconfig, sys; print(sys.version_info[1], sysconfig.get_path('include'), sep='\\n')"
    try:
        done = subprocess.run([python, "-X", "utf8", "-c", probe], capture_output=True, encoding="utf-8", timeout=60)
        minor, include = done.stdout.splitlines()
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{python} does not answer: {error}") from error
    if not (Path(include) / "Python.h").is_file():
        raise BuildError(f"{python} has no headers in {include}")
    return int(minor), Path(include)


def find_pythons() -> list[str]:
    """One CPython with headers per version of PYTHONS, as far as there are any: on PATH, or among pyenv's."""
    found = {}
    for version in PYTHONS:
        pyenv = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
        for python in (*pyenv, f"python{version}"):
            with contextlib.suppress(BuildError):
                if f"3.{headers(python)[0]}" == version:
                    found[version] = python
    return list(found.values())


def describe(path: Path, mirrors: list[str]) -> dict:
    """A wheel's entry in the index."""
    distribution, version, *compressed = path.stem.split("-")
    pythons, abis, platforms = (part.split(".") for part in compressed)
    return {
        "name": distribution.replace("_", "-"),
        "version": version,
        "file": path.name,
        "tags": [f"{p}-{a}-{s}" for p in pythons for a in abis for s in platforms],
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
        "urls": [f"{mirror.rstrip('/')}/{path.name}" for mirror in mirrors],
    }


def write_index(folder: Path, mirrors: list[str]) -> Path:
    """index.json of the wheels in `folder`.

    Raises:
        BuildError: they are of several releases, or too large.
    """
    wheels = [describe(path, mirrors) for path in sorted(folder.glob("*.whl"))]
    versions = {wheel["version"] for wheel in wheels}
    if len(versions) > 1:
        raise BuildError(f"{folder} holds wheels of several releases: {', '.join(sorted(versions))}")
    total = sum(wheel["size"] for wheel in wheels)
    if total > LIMIT:
        raise BuildError(f"the wheels have {total} bytes, the limit is {LIMIT}")
    path = folder / "index.json"
    path.write_bytes((json.dumps({"format": 1, "wheels": wheels}, indent=1) + "\n").encode())
    return path


def faults(folder: Path) -> list[str]:
    """What is wrong with a folder of wheels: the index is not of these files, or they are of another version than this checkout."""
    listed = {wheel["file"]: wheel for wheel in json.loads((folder / "index.json").read_text(encoding="utf-8"))["wheels"]}
    present = {path.name: path for path in folder.glob("*.whl")}
    found = [f"{name} is listed, but not there" for name in listed.keys() - present.keys()]
    found += [f"{name} is not listed" for name in present.keys() - listed.keys()]
    for name in listed.keys() & present.keys():
        if listed[name] != {**describe(present[name], []), "urls": listed[name]["urls"]}:
            found.append(f"{name} is not the wheel that the index describes")
    version = project()["version"]
    other = sorted({wheel["version"] for wheel in listed.values()} - {version})
    if other:
        found.append(f"the wheels are of {', '.join(other)}, this checkout of {version}: build the wheels again")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the launchers' wheels and index.json.")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder; wheels that are in it are replaced (wheels/)")
    parser.add_argument("--python", action="append", help="a CPython to build a launcher for (default: every one found)")
    parser.add_argument("--target", action="append", choices=launcher_cross.TARGETS, help="a system to build for (default: all)")
    parser.add_argument("--no-build", action="store_true", help="build none: collect those of --add")
    parser.add_argument("--add", type=Path, help="a folder with launcher wheels built elsewhere, taken over as they are")
    parser.add_argument("--mirror", action="append", default=[], help="https folder that will hold the wheels too")
    parser.add_argument("--check", action="store_true", help="build nothing; exit code 1 where the wheels are not this checkout's")
    args = parser.parse_args(argv)
    if args.check:
        found = faults(args.out)
        print("\n".join(found) or "The wheels are this checkout's.")
        return int(bool(found))
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        try:
            for python in [] if args.no_build else args.python or find_pythons():
                for target in args.target or launcher_cross.TARGETS:
                    print(build_launcher(python, target, fresh).name, flush=True)
            for wheel in sorted(args.add.glob("*.whl")) if args.add else ():
                (fresh / wheel.name).write_bytes(wheel.read_bytes())
            write_index(fresh, args.mirror)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
        args.out.mkdir(parents=True, exist_ok=True)
        for old in args.out.glob("*.whl"):
            old.unlink()
        for path in sorted(fresh.iterdir()):
            (args.out / path.name).write_bytes(path.read_bytes())
            print(f"{path.stat().st_size:>9} {args.out / path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
