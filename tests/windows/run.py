"""The installer, the loader and the launchers as on Windows: `python3 dev.py windows [--full]`, on Linux with wine.

Sets up, once, a wine prefix and a Windows CPython (wine_python.py), cross-compiles a stub of the driver's library and the launcher,
copies the checkout, and runs the tests below in there, with progress and a summary. No GPU; torch only where `--torch` asks for it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import wine_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "wheels"))

# What is tested -> pytest's arguments. The short form takes two minutes on two quiet cores, and the first time three to set up.
SHORT = {
    "driver, both launchers": ["tests/kernels/test_driver.py"],
    "portable layout, code pages, a launcher in use": ["tests/install/test_windows.py"],
    "exchange in site-packages": ["tests/install/test_install_exchange.py"],
    "the import hook": ["tests/install/test_install_prestartup.py", "-k", "library or from_imports or shadow or metadata"],
    "planner": ["tests/package/test_plan.py", "tests/package/test_auto.py", "tests/kernels/test_params.py"],
}
FULL = {
    **SHORT,
    "the import hook": ["tests/install/test_install_prestartup.py"],
    "install.py, every state": ["tests/install/test_install.py"],
    "install.py, damaged files": ["tests/install/test_install_damage.py"],
    "install.py, odd surroundings": ["tests/install/test_install_environment.py"],
    "install.py, indexes and mirrors": ["tests/install/test_install_index.py"],
}
WITH_TORCH = {
    "with torch: planner, workloads, varlen": [
        "tests/package/test_plan.py",
        "tests/numerics/test_inputs.py",
        "tests/package/test_packed.py",
        "tests/package/test_auto.py",
    ],
    "with torch: import, the node's report": ["tests/package/test_import.py", "tests/install/test_install_result.py"],
}


def say(text: str) -> None:
    print(f"windows: {text}", flush=True)


def windows_path(path: Path) -> str:
    """As programs under wine see it."""
    return "Z:" + str(path).replace("/", "\\")


def copy_checkout(target: Path) -> None:
    """The files that git tracks or would track, so that no test can touch the checkout."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def run_tests(wine: wine_python.Wine, python: Path, checkout: Path, arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Run pytest under wine; shows its failures as they come. Returns its exit code and its last line."""
    command = [python, "tests/windows/run_tests.py", "-p", "no:cacheprovider", "-q", "--timeout=300", *arguments]
    last = ""
    with wine.start(command, checkout, **environment) as process:
        for line in (raw.decode("utf-8", errors="replace").rstrip() for raw in process.stdout):
            if re.match(r"(FAILED|ERROR|E  )|.* in [\d.]+s", line):
                print(f"    {line[:240]}", flush=True)
            last = line or last
    return process.returncode, last


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py windows", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also every state that install.py can meet: some ten minutes more")
    parser.add_argument("--torch", action="store_true", help="also what runs with torch for Windows under wine (130 MB)")
    parser.add_argument("--only", metavar="WORD", help="of these, what has WORD in its name")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "windows", help="for wine's prefix and the Python (build/windows)")
    parser.add_argument("--python", default=sys.executable, help="a Linux CPython 3.10 to 3.13 with headers, whose version is tested")
    args = parser.parse_args()
    begun = time.monotonic()
    args.folder.mkdir(parents=True, exist_ok=True)
    try:
        say("wine's prefix")
        wine = wine_python.Wine(args.folder / "prefix")
        say("a Windows CPython (downloads 70 MB once)")
        python = wine_python.make_python(args.folder / "python", args.python)
        say("the stub driver and the launcher (zig compiles its C++ library first, once)")
        import build as wheels

        wine_python.compile_c(ROOT / "tests" / "stub_driver.c", args.folder / "nvcuda.dll")
        launcher = wheels.build_launcher(args.python, "win_amd64", args.folder / "wheels")
        with_torch = python
        if args.torch:
            say("a second one with torch")
            with_torch = wine_python.make_python(args.folder / "python-torch", args.python)
            wine_python.add_torch(with_torch, f"3{wheels.headers(args.python)[0]}")
        copy_checkout(args.folder / "checkout")
    except (wine_python.Unavailable, OSError, subprocess.SubprocessError, RuntimeError) as error:
        print(f"windows: {error}", file=sys.stderr)
        return 1
    environment = {"STUB_DRIVER": windows_path(args.folder / "nvcuda.dll"), "STUB_LAUNCHER": windows_path(launcher), "SLOWER_TIMES": "10"}
    say(f"set up after {time.monotonic() - begun:.0f} s")
    results = []
    for name, tests in ((FULL if args.full else SHORT) | (WITH_TORCH if args.torch else {})).items():
        if args.only and args.only not in name:
            continue
        start = time.monotonic()
        say(name)
        code, last = run_tests(wine, with_torch if name in WITH_TORCH else python, args.folder / "checkout", tests, environment)
        results.append((name, code, last, time.monotonic() - start))
    print()
    for name, code, last, seconds in results:
        print(f"{'ok    ' if code == 0 else 'FAILED'} {name:50} {seconds:4.0f} s  {last}")
    subprocess.run(["wineserver", "-k"], env=wine.environment, check=False)
    return int(any(code for _, code, _, _ in results) or not results)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
