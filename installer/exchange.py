"""Exchanges an installed distribution for another by renames, so that killing this at any point leaves the old or the new one.

In site-packages, during an exchange only:

    .sageattention-install/lock                 held by the one process that works here
    .sageattention-install/new-N, old-N         the new one, unpacked, before it is moved in; the old one once it is moved out
    .sageattention-install/exchange-N-NAME      empty; while it is there, exchange N of the distribution NAME is not decided
    sageattention-install.pth                   keeps the new one importable while neither is in its place

All that a later run has to know is in names, as a crash may leave any file's content zeroed. First all of the old one moves out, then
all of the new one in; taking back goes the other way round. Nothing is deleted before the exchange is decided.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from . import LAUNCHER, PACKAGE, Problem, module_of
from .installed import Installed
from .wheel import unpack

WORK, FALLBACK = ".sageattention-install", "sageattention-install.pth"
RETRY_SECONDS = 2.0  # a virus scanner on Windows holds fresh files for moments


def move(source: Path, target: Path) -> None:
    """Rename; where Windows refuses because somebody has the file open, try for a while."""
    deadline = time.monotonic() + (RETRY_SECONDS if os.name == "nt" else 0)
    while True:
        try:
            os.rename(source, target)
            return
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.1)


class Undecided:
    """An exchange between its first and its last rename, found by the name of its marker."""

    def __init__(self, marker: Path):
        match = re.fullmatch(r"exchange-(\d+)-([\w-]+)", marker.name)
        suffix = f"-{match[1]}" if match else ""
        self.marker, self.site = marker, marker.parent.parent
        self.new, self.old = marker.parent / f"new{suffix}", marker.parent / f"old{suffix}"
        # Release 3.0.0 named nothing (its journal.json may be damaged): then what lies there tells.
        lying = [entry for entry in [*_entries(self.new), *_entries(self.old)] if entry.lower().startswith(PACKAGE)]
        self.modules = [module_of(match[2])] if match else sorted({_module(entry) for entry in lying})

    def take_back(self) -> None:
        """Put the old one back in its place. Whatever fails, nothing is lost, and the next run goes on from there.

        Raises:
            OSError: a file could not be moved.
        """
        for module in self.modules:
            ready = [entry for entry in _entries(self.new) if _belongs(entry, module)]
            if len({entry.endswith(".dist-info") for entry in ready}) == 2 or not self.new.is_dir():
                continue  # all of the new one is here still, or there is none: what is in site-packages is the old one's
            for entry in _entries(self.site):
                if _belongs(entry, module):
                    move(self.site / entry, self.new / entry)
        failure = None
        for entry in _entries(self.old):
            try:
                move(self.old / entry, self.site / entry)
            except OSError as error:
                failure = error
        if failure:
            raise failure
        self.decide()

    def decide(self) -> None:
        """From here on the state of site-packages holds; what is left in the working folder may be deleted."""
        self.marker.unlink()
        (self.site / FALLBACK).unlink(missing_ok=True)


def _entries(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _module(entry: str) -> str:
    return module_of(LAUNCHER) if entry.lower().startswith(module_of(LAUNCHER)) else PACKAGE


def _belongs(entry: str, module: str) -> bool:
    """Whether a file of site-packages is that module or its metadata."""
    return bool(re.fullmatch(rf"{module}(\..+|-[^-]+\.dist-info)?", entry, re.IGNORECASE)) and not entry.endswith(".pth")


def undecided(work: Path) -> list[Undecided]:
    return [Undecided(work / name) for name in _entries(work) if name == "journal.json" or name.startswith("exchange-")]


def _lock(path: Path) -> IO[bytes] | None:
    """The file, locked by this process; None where another one has it."""
    try:
        lock = open(path, "a+b")  # noqa: SIM115
    except FileNotFoundError:  # the other one has just removed the folder
        return None
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
            return lock
    except OSError:
        pass  # held by another process; or that one has just ended, and removed the file
    lock.close()
    return None


@contextlib.contextmanager
def exclusive(site: Path, said: Callable[[str], object] = lambda text: None) -> Iterator[Path]:
    """The working folder in `site`, held by this process alone; what an interrupted run left is taken back first.

    Raises:
        Problem: another process is at work there, the folder can't be written, or an earlier exchange can't be taken back.
    """
    work = site / WORK
    try:
        work.mkdir(exist_ok=True)
        lock = _lock(work / "lock")
    except OSError as error:
        raise Problem(f"{site} can't be written ({error.strerror}).") from error
    if lock is None:
        raise Problem(f"Another install is running in {site}.")
    try:
        for exchange in undecided(work):
            _take_back(exchange)
            said("An interrupted install was taken back first.")
        (site / FALLBACK).unlink(missing_ok=True)
        _clear(work)
        yield work
    finally:
        whole = not undecided(work)
        if whole:
            _clear(work)
            if os.name != "nt":
                (work / "lock").unlink(missing_ok=True)  # under the lock: whoever opened it before sees that it is not this one any more
        lock.close()
        with contextlib.suppress(OSError):  # on Windows a library in use stays until the next run
            if whole and os.name == "nt":
                (work / "lock").unlink()
            work.rmdir()


def _clear(work: Path) -> None:
    """Delete what no exchange needs any more, as far as it can be deleted."""
    for entry in _entries(work):
        if re.match("(new|old)(-|$)", entry):
            shutil.rmtree(work / entry, ignore_errors=True)


def _take_back(exchange: Undecided) -> None:
    try:
        exchange.take_back()
    except OSError as error:
        raise Problem(
            f"An exchange in {exchange.site} could not be taken back: {error.filename or exchange.site} can't be moved ({error.strerror}). "
            f"Nothing is lost, it lies in {exchange.marker.parent}. Close ComfyUI and run this again."
        ) from error


def exchange(wheel: Path | None, name: str, old: Installed | None, site: Path, prove: Callable[[Path], None]) -> None:
    """Install `wheel` (None: nothing) of the distribution `name` in place of `old`.

    Raises:
        Problem: that, or `prove(site)`, failed; `old` is there as before.
    """
    with exclusive(site) as work:
        taken = {int(match[1]) for match in (re.search(r"-(\d+)", entry) for entry in _entries(work)) if match}
        number = max(taken, default=0) + 1  # a library in use, on Windows, may keep an earlier `old`
        new = work / f"new-{number}"
        try:
            if wheel:
                unpack(wheel, module_of(name), new)
            entries = _entries(new)
            (work / f"old-{number}").mkdir()
            marker = work / f"exchange-{number}-{name}"
            marker.touch(exist_ok=False)
        except OSError as error:
            raise Problem(f"{site} can't be written ({error.strerror}).") from error
        this = Undecided(marker)
        try:
            (site / FALLBACK).write_text(f"{WORK}/{new.name}\n", encoding="ascii")  # relative to site-packages
            for entry in sorted({*entries, *(old.entries or () if old else ())}):
                if (site / entry).exists():
                    move(site / entry, this.old / entry)
            for entry in entries:
                move(new / entry, site / entry)
            prove(site)
        except OSError as error:
            _take_back(this)
            raise Problem(f"{error.filename or site} can't be moved ({error.strerror}). Close ComfyUI and run this again.") from error
        except BaseException:  # also Ctrl-C
            _take_back(this)
            raise
        this.decide()
