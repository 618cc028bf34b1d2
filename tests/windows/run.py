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
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import wine_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "wheels"))

import build as wheels  # noqa: E402

T = TypeVar("T")


class Step(NamedTuple):
    """One run of pytest.

    Attributes:
        full: only with `--full`.
        needs: "driver" for the stub driver and the launcher, "torch" for the Python that has it, which `--torch` asks for.
    """

    name: str
    arguments: tuple[str, ...]
    full: bool = False
    needs: str = ""


HOOK, WINDOWS = "tests/install/test_install_prestartup.py", "tests/install/test_windows.py"
# What takes longest first, but what needs more than a Python last: that is compiled and downloaded meanwhile.
STEPS = (
    Step("install.py, odd surroundings", ("tests/install/test_install_environment.py",), full=True),
    Step("install.py, damaged files", ("tests/install/test_install_damage.py",), full=True),
    Step("install.py, every state", ("tests/install/test_install.py",), full=True),
    Step("install.py, indexes and mirrors", ("tests/install/test_install_index.py",), full=True),
    Step("exchange in site-packages", ("tests/install/test_install_exchange.py",)),
    Step("portable layout, code pages", (WINDOWS, "-k", "portable_build or code_page")),
    Step("planner", ("tests/package/test_plan.py", "tests/package/test_auto.py", "tests/kernels/test_params.py")),
    Step("the import hook", (HOOK, "-k", "library or from_imports or shadow or metadata")),
    Step("the import hook, all else", (HOOK, "-k", "not (library or from_imports or shadow or metadata)"), full=True),
    Step("driver, both launchers", ("tests/kernels/test_driver.py",), needs="driver"),
    Step("doctor, a launcher in use", (WINDOWS, "-k", "not (portable_build or code_page)"), needs="driver"),
    Step("with torch: import, the node's report", ("tests/package/test_import.py", "tests/install/test_install_result.py"), needs="torch"),
    Step(
        "with torch: planner, workloads, varlen",
        ("tests/package/test_plan.py", "tests/numerics/test_inputs.py", "tests/package/test_packed.py", "tests/package/test_auto.py"),
        needs="torch",
    ),
)


def say(text: str) -> None:
    sys.stdout.write(f"windows: {text}\n")  # in one piece: steps run side by side
    sys.stdout.flush()


def windows_path(path: Path) -> str:
    """As programs under wine see it."""
    return "Z:" + str(path).replace("/", "\\")


def copy_checkout(target: Path) -> Path:
    """The files that git tracks or would track, in `target`, so that no test can touch the checkout."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"], check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def run_tests(wine: wine_python.Wine, python: Path, checkout: Path, step: Step, environment: dict[str, str]) -> tuple[int, str]:
    """Run pytest under wine; shows its failures as they come. Returns its exit code and its last line."""
    command = [python, "tests/windows/run_tests.py", "-p", "no:cacheprovider", "-q", "--timeout=300", *step.arguments]
    last = ""
    with wine.start(command, checkout, **environment) as process:
        for line in (raw.decode("utf-8", errors="replace").rstrip() for raw in process.stdout):
            if re.match(r"(FAILED|ERROR|E  )", line):
                say(f"{step.name}: {line[:240]}")
            last = line or last
    return process.returncode, last


class SetUp:
    """What steps need, made side by side. `wine`, `python` and `checkout` are there at once; `needed` waits for the others."""

    def __init__(self, folder: Path, linux: str, torch: bool):
        self._folder, self._linux = folder, linux
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor()
        driver = self._pool.submit(
            self._timed, "the stub driver and the launcher (zig compiles its C and C++ libraries first, once)", self._driver
        )
        wine = self._pool.submit(self._timed, "wine's prefix", wine_python.Wine, folder / "prefix")
        python = "a Windows CPython (downloads 70 MB once)"
        self.python = self._timed(python, wine_python.make_python, folder / "python", linux)
        self._needed: dict[str, Future[Any]] = {"driver": driver}
        if torch:
            name = "a copy of it with torch (downloads 160 MB once)"
            self._needed["torch"] = self._pool.submit(
                self._timed, name, wine_python.with_torch, self.python, folder / "python-torch", linux
            )
        self.checkout = copy_checkout(folder / "checkout")
        self.wine: wine_python.Wine = wine.result()
        self._pool.shutdown(wait=False)

    def needed(self, step: Step) -> tuple[Path, dict[str, str]]:
        """(the Python that runs a step, its environment), once they are there."""
        environment = {"SLOWER_TIMES": "10"}
        if step.needs == "driver":
            driver, launcher = self._needed["driver"].result()
            environment |= {"STUB_DRIVER": windows_path(driver), "STUB_LAUNCHER": windows_path(launcher)}
        return self._needed["torch"].result() if step.needs == "torch" else self.python, environment

    def _driver(self) -> tuple[Path, Path]:
        """(the stub of the driver's library, the launcher's wheel)"""
        driver = self._folder / "nvcuda.dll"
        wine_python.compile_dll(ROOT / "tests" / "stub_driver.c", driver)
        return driver, wheels.build_launcher(self._linux, "win_amd64", self._folder / "wheels")

    @staticmethod
    def _timed(name: str, make: Callable[..., T], *arguments: Any) -> T:
        say(f"{name} ...")
        begun = time.monotonic()
        made = make(*arguments)
        say(f"{name}: ready in {time.monotonic() - begun:.0f} s")
        return made


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev.py windows", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="also every state that install.py can meet")
    parser.add_argument("--torch", action="store_true", help="also what runs with torch for Windows under wine")
    parser.add_argument("--only", metavar="WORD", default="", help="of these, what has WORD in its name")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "windows", help="for wine's prefix and the Python (build/windows)")
    parser.add_argument("--python", default=sys.executable, help="a Linux CPython 3.10 to 3.13 with headers, whose version is tested")
    parser.add_argument(
        "--jobs", type=int, default=min(os.cpu_count() or 1, 4), metavar="N", help="steps side by side (a core each, up to 4)"
    )
    args = parser.parse_args()
    steps = [s for s in STEPS if (args.full or not s.full) and (args.torch or s.needs != "torch") and args.only in s.name]
    if not steps:
        parser.error(f"no step has {args.only!r} in its name")
    try:
        wine_python.require()
        ready = SetUp(args.folder, args.python, args.torch)

        def run(step: Step) -> tuple[int, str, float]:
            python, environment = ready.needed(step)
            say(f"{step.name} ...")
            begun = time.monotonic()
            code, last = run_tests(ready.wine, python, ready.checkout, step, environment)
            return code, last, time.monotonic() - begun

        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(run, steps))
    except (wine_python.Unavailable, wheels.BuildError, OSError, subprocess.SubprocessError) as error:
        print(f"windows: {error}", file=sys.stderr)
        return 1
    print()
    for step, (code, last, seconds) in zip(steps, results):
        print(f"{'ok    ' if code == 0 else 'FAILED'} {step.name:50} {seconds:4.0f} s  {last}")
    ready.wine.stop()
    return int(any(code for code, _, _ in results))


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
