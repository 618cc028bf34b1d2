"""One run of the install hook: what it finds, does and has to say."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import LAUNCHER, PACK, PACKAGE, Problem, module_of
from .exchange import WORK, exchange, exclusive
from .index import Index, Listed
from .installed import Installed, find, numbers, paths, torch_version
from .interpreter import Import, package_installer, python_command, run, supported_tags
from .wheel import Bundle

FALLS_BACK = "The nodes work all the same: they use the package that came with this pack, launching through ctypes."


def result_file() -> Path | None:
    """Where ComfyUI's user directory is, as far as this process can tell; the node and prestartup_script.py read it there."""
    bases = [os.environ.get("COMFYUI_FOLDERS_BASE_PATH"), PACK.parent.parent if PACK.parent.name == "custom_nodes" else None]
    for base in [*bases, os.environ.get("COMFYUI_PATH")]:
        if base and (Path(base) / "custom_nodes").is_dir():
            return Path(base) / "user" / "__sageattention" / "install.json"
    return None


def prove_import(name: str, attribute: str, site: Path) -> None:
    imported = Import(module_of(name), attribute)
    if imported.file is None or not Path(imported.file).resolve().is_relative_to(site.resolve()):
        cause = imported.cause or f"Python takes {imported.file} instead"
        raise Problem(f"The new {name} does not import: {cause}. It was taken out again.")


def prove_package(site: Path) -> None:
    prove_import(PACKAGE, "sageattn", site)
    doctor = run([*python_command(), "-m", PACKAGE, "doctor", "--json"])
    try:
        json.loads(doctor.stdout[doctor.stdout.find("{") :])
    except ValueError:
        doctor.returncode = doctor.returncode or 1
    if doctor.returncode:
        raise Problem(f"`-m sageattention doctor` fails: {(doctor.stderr or doctor.stdout).strip()[-400:]}. It was taken out again.")


def prove_launcher(site: Path) -> None:
    prove_import(LAUNCHER, "__version__", site)


def by_hand(wheel: Bundle | Listed) -> list[list[str]]:
    """The commands that install it."""
    install = [*package_installer(), "--no-deps", "--force-reinstall"]
    if isinstance(wheel, Listed):
        return [[*install, wheel.place()]]
    folder = tempfile.gettempdir()
    return [[*python_command(), str(PACK / "install.py"), "--wheel", folder], [*install, str(Path(folder) / wheel.file)]]


class Hook:
    """Attributes: lines (what it has to say), done (what it installed), result (what becomes install.json), file (where)."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.file = args, result_file()
        self.lines: list[str] = []
        self.done: list[str] = []
        self.failed = False
        self.site, self.only_say = Path(sysconfig.get_path("purelib")), args.print or args.dry_run
        self.result: dict[str, Any] = {"format": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": sys.executable,
                                       "pack": None, "torch": torch_version(), "installed": None,
                                       "launcher": {"version": None, "why": ""}}  # fmt: skip

    def put(self, wheel: Bundle | Listed, old: Installed | None, prove: Callable[[Path], None]) -> bool:
        """Install a wheel; with --print or --dry-run only say so."""
        site = old.folder if old else self.site
        if old and (old.entries is None or not os.access(old.folder, os.W_OK)):
            raise Problem(f"{wheel.name} in {old.folder} can't be written, or was not put there by pip: remove it as it came.")
        if self.args.print:
            self.lines += map(subprocess.list2cmdline, by_hand(wheel))
            return False
        if self.args.dry_run:
            self.lines.append(f"Would install {wheel.file} into {site}.")
            return False
        managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
        if sys.prefix == sys.base_prefix and managed.exists() and not os.environ.get("PIP_BREAK_SYSTEM_PACKAGES"):
            raise Problem(f"{sys.executable} belongs to the system ({managed}): use a virtual environment.")
        with tempfile.TemporaryDirectory() as folder:
            exchange(wheel.bring(Path(folder)), wheel.name, old, site, prove)
        self.done.append(f"{wheel.name} {wheel.version}")
        return True

    def package(self, index: Index | None, bundle: Bundle) -> tuple[str, str]:
        """Bring `sageattention` to the wanted state. Returns the outcome, and the version that the launcher must have."""
        old, wheel = find(PACKAGE), (index.best(PACKAGE) if index and self.args.index else None) or bundle
        healthy, cause, fatal, outcome, newest = True, "", False, "current", wheel.version
        if old and old.ours:
            if numbers(old.version) > numbers(newest) and not self.args.replace:
                outcome = "kept-newer"
                self.lines.append(f"sageattention {old.version} is newer than this pack's {newest} and kept; --replace installs {newest}.")
            wanted = outcome == "current" and not (old.version == newest and old.holds(wheel.record()))
            if wanted and not old.holds({}):  # by its own record
                self.lines.append(f"The sageattention in {old.folder} was damaged.")
        elif old:
            healthy, cause, fatal = self.health(old)
            outcome, wanted = "kept-foreign" if healthy else "broken-foreign", self.args.replace
            self.lines += [] if wanted else [about_foreign(old, cause)]
        else:
            wanted = True
        if wanted and self.put(wheel, old, prove_package):
            outcome, old, healthy, cause, fatal = "installed", find(PACKAGE), True, "", False
        if old:
            path = old.folder / PACKAGE
            self.result["installed"] = {"version": old.version, "ours": old.ours, "path": str(path), "healthy": healthy, "cause": cause,
                                        "fatal": fatal, "stamp": path.stat().st_mtime_ns if path.exists() else None,
                                        "fingerprint": old.fingerprint()}  # fmt: skip
        return outcome, old.version or newest if old and outcome == "kept-newer" else newest

    def health(self, foreign: Installed) -> tuple[bool, str, bool]:
        """Whether it imports, the cause where not, whether no `except` helps. What the last run found holds while nothing has changed."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no earlier result, or none that can be read
            known = json.loads(self.file.read_text(encoding="utf-8"))["installed"] if self.file else {}
            if known["fingerprint"] == foreign.fingerprint():
                return known["healthy"], known["cause"], known["fatal"]
        imported = Import(PACKAGE, "sageattn")
        return imported.file is not None, imported.cause, imported.fatal

    def launcher(self, index: Index | None, why: str, version: str) -> None:
        """Bring the compiled launcher to `version`; without it ctypes launches, so a failure is only told."""
        old, wheel = find(LAUNCHER), index.best(LAUNCHER, version) if index else None
        state = self.result["launcher"]
        try:
            if wheel is None:
                if old and old.version != version and version == self.result["pack"] and not self.only_say:
                    self.remove(old)  # of another version it is only warned about
                raise Problem(
                    why or f"No compiled launcher for {supported_tags()[0]}: ctypes launches the kernels, some microseconds slower."
                )
            if not (old and old.version == version and old.holds(wheel.record())):
                self.put(wheel, old, prove_launcher)
        except Problem as problem:
            state["why"] = str(problem)
            self.lines.append(str(problem))
        found = find(LAUNCHER)
        state["version"] = found.version if found else None

    def triton(self) -> None:
        """On Windows: name the triton-windows that fits torch, or install it where that was asked for.

        Raises:
            Problem: it was asked for, and there is none, or it could not be installed.
        """
        if os.name != "nt" or not self.result["torch"]:
            self.lines += ["--with-triton: torch brings its Triton on this system."] if self.args.with_triton and os.name != "nt" else []
            return
        file, torch = PACK / "wheels" / "triton_windows.json", numbers(self.result["torch"])[:2]
        try:
            releases = {numbers(release["torch"]): release for release in json.loads(file.read_bytes())["releases"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise Problem(f"{file} can't be read ({error}): install the node pack again.") from error
        release = releases.get(torch)
        if release is None:
            unknown = f"No triton-windows is known for torch {self.result['torch']}; only the Triton variant needs one."
            if self.args.with_triton:
                raise Problem(f"{unknown} Install the one that its project names for this torch, or update this node pack.")
            self.lines.append(unknown)
            return
        found = find("triton-windows")
        if found and numbers(found.version)[:2] == numbers(release["version"])[:2]:
            return
        pin = f"triton-windows=={release['version']}"
        if not self.args.with_triton:
            self.lines.append(f"Only the Triton variant needs {pin}, which fits torch {self.result['torch']}: --with-triton installs it.")
            return
        with tempfile.TemporaryDirectory() as folder:
            requirement = Path(folder) / "requirement.txt"
            requirement.write_text(" ".join([pin, *(f"--hash=sha256:{digest}" for digest in release["sha256"])]) + "\n", encoding="utf-8")
            command = [*package_installer(), "--no-deps", "--require-hashes", "-r", str(requirement)]
            if self.only_say:
                self.lines.append(subprocess.list2cmdline([*package_installer(), "--no-deps", pin]))
                return
            child = run(command)
        if child.returncode:
            raise Problem(f"{pin} was not installed: {(child.stderr or child.stdout).strip()[-800:]}")
        self.done.append(pin)

    @staticmethod
    def remove(installed: Installed) -> None:
        exchange(None, installed.name, installed, installed.folder, lambda site: None)

    def uninstall(self) -> str:
        ours = [found for name in (PACKAGE, LAUNCHER) if (found := find(name)) and found.ours]
        for found in ours if not self.only_say else ():
            self.remove(found)
        verb = "Would remove" if self.only_say else "Removed"
        self.lines.append(f"{verb}: {', '.join(found.name for found in ours)}." if ours else "Nothing of this pack is installed.")
        return "uninstalled"

    def install(self) -> str:
        """The package, the launcher, Triton; returns the outcome."""
        bundle, why = Bundle(), ""
        self.result["pack"] = bundle.version
        index = None
        try:
            index = Index(self.args.index or str(PACK / "wheels"), self.args.timeout)
        except Problem as problem:
            if self.args.index:
                raise
            why = str(problem)  # the launchers' wheels are not to be had; the package lies in the pack
        outcome, version = self.package(index, bundle)
        self.launcher(index, why, version)
        try:
            self.triton()
        except Problem as problem:
            self.lines.append(str(problem))
            self.failed = True
        return outcome

    def work(self) -> int:
        """Do it all. Returns the exit code: 0 unless something that was asked for by a flag failed."""
        asked = self.args.replace or self.args.with_triton or self.args.uninstall
        try:
            for folder in paths() if not self.only_say else ():
                if (folder / WORK).is_dir():
                    with exclusive(folder, self.lines.append):
                        pass
            outcome = self.uninstall() if self.args.uninstall else self.install()
        except (Problem, OSError, subprocess.SubprocessError) as problem:
            self.lines += [str(problem), FALLS_BACK]
            outcome, self.failed = "bundled-only", True
        if self.done:
            self.lines.insert(0, f"Installed {', '.join(self.done)} for {sys.executable}.")
        self.result |= {"outcome": outcome, "message": "\n".join(self.lines) or f"sageattention {self.result['pack']} is up to date."}
        return int(self.failed and bool(asked))

    def save(self) -> None:
        """Write the result for the node, at once or not at all."""
        if self.file is None or self.only_say:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
            os.replace(fresh, self.file)
        except OSError as error:
            print(f"The result could not be written: {error}.", file=sys.stderr)


def about_foreign(old: Installed, cause: str) -> str:
    name = f"sageattention {old.version or '(without metadata)'} in {old.folder}, which is not this pack's,"
    if not cause:
        return f"{name} works and is kept for --use-sage-attention and other packs; --replace puts this pack's in its place."
    replace = subprocess.list2cmdline([*python_command(), str(PACK / "install.py"), "--replace"])
    return (
        f"{name} IS BROKEN: {cause}\nIn ComfyUI this pack's own runs in its place; other programs of this Python fail with it. "
        f"To put this pack's there: {replace}"
    )
