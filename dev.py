#!/usr/bin/env python3
"""Everything a developer runs, on a machine that has a clone and Python ≥ 3.10 and nothing else.

    python3 dev.py demo     sample a small diffusion model with every attention variant, and picture the difference
    python3 dev.py test     the tests (further arguments go to pytest; `-n 0` for one process)
    python3 dev.py lint     ruff, mypy and clang-format
    python3 dev.py build    the CUDA kernels (further arguments go to csrc/tools/build.py)
    python3 dev.py wheels   the launchers' wheels and their index (further arguments go to wheels/build.py)
    python3 dev.py windows  installer, loader and launchers as on Windows, under wine (Linux; `--full` for all of it)
    python3 dev.py browser  the nodes in ComfyUI's front end, in a headless Chromium (Linux; needs COMFYUI_PATH; screenshots in out/browser)
    python3 dev.py bench    the kernels' speed (further arguments go to `python -m sageattention bench`)

Each makes .venv beside this file on its first run, with the packages that requirements-dev.txt pins (`test` also .clients, with
those of requirements-clients.txt). `--here` uses the Python that
runs this file instead, and installs nothing. With COMFYUI_PATH set, `demo` samples in that ComfyUI, with the Python that
COMFYUI_PYTHON names, or ComfyUI's own virtual environment, or (with --here) this one; so does `browser`, which needs pytest there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "requirements.sha256"
REQUIREMENTS = ROOT / "requirements-dev.txt"
CLIENTS = ROOT / ".clients"
CLIENT_REQUIREMENTS = ROOT / "requirements-clients.txt"
# Only where torch brings no Triton of its own (its builds without CUDA): to interpret the kernels, and to compile them for cards.
TRITON = {"linux": "triton==3.6.0", "win32": "triton-windows==3.6.0.post26"}.get(sys.platform)
WHEEL_TOOLS = ["ziglang==0.17.1"]  # besides the pinned requirements; the same tools give the same bytes
OLDEST = (3, 10)


class Failed(Exception):
    """A step that can't be done; the message says what to do about it. `code` becomes the exit code."""

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def say(message: str) -> None:
    print(f"dev.py: {message}", flush=True)


def run(step: str, command: list[str], **options) -> None:
    """Run a step whose failure ends everything; says what it is and how long it took."""
    say(f"{step} ...")
    begun = time.monotonic()
    code = subprocess.call(command, **options)
    if code:
        raise Failed(f"{step} failed (exit code {code}): {' '.join(command)}", code)
    say(f"{step}: done in {time.monotonic() - begun:.0f} s")


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def environment() -> str:
    """The Python of .venv, made or brought up to date where the pinned requirements have changed since."""
    python = venv_python()
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + repr((TRITON, sys.version_info[:2])).encode()).hexdigest()
    if python.exists() and STAMP.exists() and STAMP.read_text() == wanted:
        return str(python)
    say("first run (or other requirements): setting up .venv; this downloads some hundred MB once")
    if not _works(python):
        make_venv()
    STAMP.unlink(missing_ok=True)
    install("the pinned packages", ["-r", str(REQUIREMENTS)])
    if TRITON and not _has(python, "triton"):
        install("Triton", [TRITON])
    STAMP.write_text(wanted)
    return str(python)


def make_venv() -> None:
    """An empty .venv of the running Python, by `venv`, or where it has no pip to put in, by uv or virtualenv."""
    if VENV.exists():
        shutil.rmtree(VENV)
    if importlib.util.find_spec("ensurepip") is not None:
        run("making .venv", [sys.executable, "-m", "venv", str(VENV)])
    elif shutil.which("uv"):
        run("making .venv with uv", ["uv", "venv", "--seed", "--python", sys.executable, str(VENV)])
    elif importlib.util.find_spec("virtualenv") is not None:
        run("making .venv with virtualenv", [sys.executable, "-m", "virtualenv", str(VENV)])
    else:
        raise Failed(
            f"{sys.executable} can't make a virtual environment: it has no ensurepip. On Debian and Ubuntu install python3-venv; "
            "elsewhere install uv or virtualenv. Or use --here with a Python that has torch and pytest."
        )


def install(what: str, arguments: list[str]) -> None:
    command = [str(venv_python()), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    run(f"installing {what}", command)


def _works(python: Path) -> bool:
    """Whether .venv is there and of this Python: one that moved, or lost its interpreter, is made anew."""
    if not python.exists():
        return False
    code = f"import sys, pip; sys.exit(sys.version_info[:2] != {tuple(sys.version_info[:2])})"
    return subprocess.call([str(python), "-c", code], stderr=subprocess.DEVNULL) == 0


def _has(python: Path | str, module: str) -> bool:
    return subprocess.call([str(python), "-c", f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"]) == 0


def comfyui_python(path: str, here: bool) -> str:
    """The Python that runs the ComfyUI in `path`."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return named
    if here:
        return sys.executable
    folder = Path(path)
    bin_python = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
    places = [folder / ".venv" / bin_python, folder / "venv" / bin_python, folder.parent / "python_embeded" / "python.exe"]
    for place in places:
        if place.exists():
            return str(place)
    raise Failed(
        f"COMFYUI_PATH is {path}, but which Python runs it? Set COMFYUI_PYTHON to it, or run this file with it and --here "
        f"(looked for {', '.join(map(str, places))}); unset COMFYUI_PATH for the demo without ComfyUI.",
        2,
    )


def demo(here: bool, arguments: list[str]) -> int:
    comfyui = os.environ.get("COMFYUI_PATH")
    python = comfyui_python(comfyui, here) if comfyui else _python(here)
    return subprocess.call([python, str(ROOT / "tests" / "showcase.py"), *arguments])


def clients() -> None:
    """.clients, made or brought up to date: programs whose code the tests call. Where they can't be had the tests go on without them."""
    stamp = CLIENTS / "requirements.sha256"
    wanted = hashlib.sha256(CLIENT_REQUIREMENTS.read_bytes() + repr(sys.version_info[:2]).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(CLIENTS, ignore_errors=True)
    try:
        install("programs that call this package", ["--no-deps", "--target", str(CLIENTS), "-r", str(CLIENT_REQUIREMENTS)])
    except Failed as failed:
        say(f"{failed}; the tests of those programs are left out")
        return
    stamp.write_text(wanted)


def test(here: bool, arguments: list[str]) -> int:
    python = _python(here)
    if not here:
        clients()
    chosen = any(a.startswith(("-n", "--numprocesses", "--pdb")) for a in arguments)
    workers = min(os.cpu_count() or 1, 4)  # more only wait for memory: the interpreted kernels are what takes the time
    if not chosen and workers > 1 and _has(python, "xdist"):
        # Each worker has a run of neighbours, which share fixtures, and takes over from another once it is through.
        arguments = ["-n", str(workers), "--dist", "worksteal", *arguments]
    return subprocess.call([python, "-m", "pytest", *arguments], cwd=ROOT)


def lint(here: bool, arguments: list[str]) -> int:
    """ruff on everything, mypy on what users run, clang-format on csrc; 0 where none has anything to say."""
    python = _python(here)
    clang_format = [python, "-c", "import clang_format; clang_format.clang_format()", "--dry-run", "-Werror"]
    sources = [str(path) for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cuh", ".cpp")]
    mypy = [python, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"), *arguments]
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "pack"  # the pack is a package by its folder's name, and a clone's need not be a module's
        pack.symlink_to(ROOT, target_is_directory=True)
        found = [
            subprocess.call([python, "-m", "ruff", "check", "."], cwd=ROOT),
            subprocess.call([*mypy, str(pack / "sageattention"), str(pack / "nodes")], cwd=folder),
            subprocess.call([*mypy, "--explicit-package-bases", "installer", "install.py", "prestartup_script.py"], cwd=ROOT),
            subprocess.call([*clang_format, *sources], cwd=ROOT),
        ]
    return max(found)


def build(here: bool, arguments: list[str]) -> int:
    return subprocess.call([_python(here), str(ROOT / "csrc" / "tools" / "build.py"), *arguments], cwd=ROOT)


def wheels(here: bool, arguments: list[str]) -> int:
    python = _python(here)
    if not here:
        install("the wheels' tools", WHEEL_TOOLS)
    return subprocess.call([python, str(ROOT / "wheels" / "build.py"), *arguments], cwd=ROOT)


def windows(here: bool, arguments: list[str]) -> int:
    python = _python(here)
    if not here:
        install("the launcher's compiler", WHEEL_TOOLS)
    return subprocess.call([python, str(ROOT / "tests" / "windows" / "run.py"), *arguments], cwd=ROOT)


def browser(here: bool, arguments: list[str]) -> int:
    """In the Python of the ComfyUI that COMFYUI_PATH names, which has to have pytest."""
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        raise Failed("set COMFYUI_PATH to a ComfyUI checkout; its front end comes with ComfyUI's own requirements.", 2)
    missing = [name for name in ("chromium", "chromedriver") if not os.environ.get(name.upper()) and not shutil.which(name)]
    if missing:
        names = " and ".join(missing)
        raise Failed(
            f"{names} not found: on Debian apt install chromium chromium-driver; elsewhere set CHROMIUM and CHROMEDRIVER to theirs.", 2
        )
    return subprocess.call([comfyui_python(comfyui, here), "-m", "pytest", "tests/nodes/test_browser.py", *arguments], cwd=ROOT)


def bench(here: bool, arguments: list[str]) -> int:
    return subprocess.call([_python(here), "-m", "sageattention", "bench", *arguments], cwd=ROOT)


def _python(here: bool) -> str:
    return sys.executable if here else environment()


COMMANDS = {
    "demo": demo,
    "test": test,
    "lint": lint,
    "build": build,
    "wheels": wheels,
    "windows": windows,
    "browser": browser,
    "bench": bench,
}


def main() -> int:
    if sys.version_info < OLDEST:
        raise Failed(f"needs Python {OLDEST[0]}.{OLDEST[1]} or newer, this is {sys.version.split()[0]} ({sys.executable})", 2)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--here", action="store_true", help="use the running Python, install nothing")
    args, others = parser.parse_known_args()
    os.environ.setdefault("PYTHONUNBUFFERED", "1")  # progress shows as it happens, also in a pipe
    begun = time.monotonic()
    code = COMMANDS[args.command](args.here, others)
    say(f"{args.command} {'ended well' if code == 0 else f'ended with exit code {code}'} after {time.monotonic() - begun:.0f} s")
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as failed:
        print(f"dev.py: {failed}", file=sys.stderr)
        sys.exit(failed.code)
    except KeyboardInterrupt:
        sys.exit(130)
