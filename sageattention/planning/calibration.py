"""What `python -m sageattention bench --calibrate` measured on a card, kept in the user's cache directory. No CUDA at import.

    {"format": 1, "made_for": {"card", "arch", "driver", "torch", "sageattention"}, "made_at": "2026-11-22 16:00",
     "points": [{"head_dim", "mask", "heads", "len_q", "len_kv", "sdpa_ms", "ms": {"variant[:pv_accum_dtype]": …}, "off": {…: reason}}]}

`auto` reads a card's file once, when it first chooses for that card. A file made for something else, or one that can't be read, is
ignored with one logged line; nothing here ever ends a run.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import _version, settings
from ..device import libcuda
from ..device.capability import Capability
from ..errors import CudaError
from ..kernels.family import MASKS
from ..numerics.constants import pad_head_dim
from ..variants import VARIANTS, Candidate
from .problem import Problem

FOLDER = "SAGEATTENTION_CACHE"  # replaces the user's cache directory
FORMAT = 1
COMMAND = "python -m sageattention bench --calibrate"
# A variant has to be this much faster than SDPA to be chosen: times vary by a few per cent from run to run.
MARGIN = 1.03
# Tokens of the longest call that is timed. Where SDPA won at a shorter one and time was up before the next, that says nothing about
# calls of more than REACH times its queries times keys.
LONGEST, REACH = 16384, 4

LOG = logging.getLogger("sageattention")


class Ignored(Exception):
    """There is a calibration file that is of no use here; the message says why and what to do."""


@dataclass(frozen=True)
class Point:
    """One call that was timed: milliseconds of torch's SDPA and of each candidate, by its text.

    `off` holds the candidates that were timed for nothing: reason by text. They are not chosen where this point counts.
    """

    head_dim: int  # compiled
    mask: str  # of `kernels.family.MASKS`
    heads: int  # over all batches
    len_q: int
    len_kv: int
    sdpa_ms: float
    ms: dict[str, float]
    off: dict[str, str] = field(default_factory=dict)

    def faster(self) -> list[Candidate]:
        """The candidates that beat SDPA, fastest first."""
        faster = [name for name, ms in self.ms.items() if ms * MARGIN < self.sdpa_ms]
        return [Candidate.parse(name) for name in sorted(faster, key=self.ms.__getitem__)]

    def slower(self) -> list[tuple[Candidate, str]]:
        """(candidate, reason) of those that don't."""
        faster = set(self.faster())
        beaten = {Candidate.parse(name): f"{ms:.3g} ms, SDPA {self.sdpa_ms:.3g} ms" for name, ms in self.ms.items()}
        slower = {candidate: reason for candidate, reason in beaten.items() if candidate not in faster}
        return list((slower | {Candidate.parse(name): reason for name, reason in self.off.items()}).items())

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.heads} heads, {self.len_q:,} queries, {self.len_kv:,} keys, mask {self.mask}"


@dataclass(frozen=True, eq=False)  # compared, and hashed, by identity: plans are cached by it
class Calibration:
    """One card's points."""

    points: tuple[Point, ...]
    made_at: str

    def point(self, problem: Problem) -> Point | None:
        """The longest call that was timed of the problem's kind and is in no respect larger than it: beyond it a variant only gains.

        None where there is none, or where SDPA won at one so much shorter that a variant may have overtaken it since.
        """
        head_dim, heads = pad_head_dim(problem.head_dim), problem.batch * problem.heads_q
        alike = [
            p for p in self.points
            if (p.head_dim, p.mask) == (head_dim, problem.mask_kind) and p.len_q <= problem.len_q and p.len_kv <= problem.len_kv
            and p.heads * p.len_q * p.len_kv <= heads * problem.len_q * problem.len_kv
        ]  # fmt: skip
        longest = max(alike, key=lambda p: p.len_q * p.len_kv, default=None)
        if longest is None or longest.faster() or longest.len_q >= LONGEST:
            return longest
        return None if problem.len_q * problem.len_kv >= REACH * longest.len_q * longest.len_kv else longest


def folder(environ: Mapping[str, str] = os.environ, system: str = "", home: str = "~") -> Path:
    """Where calibrations lie: the user's cache directory as the system has it, or what SAGEATTENTION_CACHE names.

    Raises:
        Ignored: the user has no home directory.
    """
    system, xdg = system or platform.system(), environ.get("XDG_CACHE_HOME", "")
    try:
        if environ.get(FOLDER):
            return Path(environ[FOLDER]).expanduser()
        if system == "Windows" and environ.get("LOCALAPPDATA"):
            return Path(environ["LOCALAPPDATA"]) / "sageattention"
        if system not in ("Windows", "Darwin") and os.path.isabs(xdg):  # a relative one is to be ignored, the XDG specification says
            return Path(xdg) / "sageattention"
        below = {"Windows": "AppData/Local", "Darwin": "Library/Caches"}.get(system, ".cache")
        return Path(home).expanduser() / below / "sageattention"
    except RuntimeError as error:  # pathlib's, of a home that can't be found
        raise Ignored(f"no place to keep one ({error}); set {FOLDER} to a folder") from error


def path(card: str) -> Path:
    """The file of a card, by its name."""
    return folder() / f"calibration-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def place(card: str) -> Path:
    """The same, in a folder that exists and can be written to.

    Raises:
        OSError: there can't be one.
    """
    file = path(card)
    file.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=file.parent).close()
    return file


def made_for(card: Capability) -> dict[str, str]:
    """What a calibration holds for; with anything else it is ignored.

    Raises:
        libcuda.NoDriver, CudaError: there is no driver to ask.
    """
    import torch

    return {
        "card": card.name,
        "arch": f"sm_{card.arch}",
        "driver": libcuda.driver_version(),
        "torch": torch.__version__,
        "sageattention": _version.__version__,
    }


def save(card: Capability, points: list[Point]) -> Path:
    """Write a card's file, whole or not at all.

    Raises:
        OSError: the folder can't be written.
    """
    file = place(card.name)
    content = {"format": FORMAT, "made_for": made_for(card), "made_at": time.strftime("%Y-%m-%d %H:%M"), "points": [*map(asdict, points)]}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
    try:
        with open(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    forget()
    return file


def reset() -> list[Path]:
    """Delete every card's file; which ones those were.

    Raises:
        OSError: one can't be deleted.
    """
    files = sorted(folder().glob("calibration-*"))  # with what a killed `save` left
    for file in files:
        file.unlink()
    forget()
    return files


def forget() -> None:
    """Let `auto` look again."""
    of_card.cache_clear()
    settings.planned_anew()


def load(card: Capability) -> Calibration | None:
    """A card's calibration, or None where there is none.

    Raises:
        Ignored: it was made for something else, or can't be read.
    """
    file = path(card.name)
    again = f"`{COMMAND}` makes it anew, with --reset it goes"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise Ignored(f"{file} can't be read ({error}); {again}") from error
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
        made, here = dict(content["made_for"]), made_for(card)
        other = [f"{name} {made.get(name)} (here {value})" for name, value in here.items() if made.get(name) != value]
        if not other:
            return Calibration(tuple(map(_point, content["points"])), str(content["made_at"]))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Ignored(f"{file} is no calibration ({type(error).__name__}: {error}); {again}") from error
    except (libcuda.NoDriver, CudaError) as error:
        raise Ignored(f"{file} can't be checked: {error}") from error
    raise Ignored(f"{file} was made for {', '.join(other)}; {again}")


def _point(given: dict[str, Any]) -> Point:
    point = Point(**given)
    times = [point.sdpa_ms, *point.ms.values()]
    if not all(type(ms) in (int, float) and 0 < ms < 1e9 for ms in times):
        raise ValueError(f"a time of {given} is none")
    if not all(type(number) is int for number in (point.head_dim, point.heads, point.len_q, point.len_kv)):
        raise ValueError(f"a size of {given} is no whole number")
    for candidate in map(Candidate.parse, point.ms):
        if candidate.accum not in ("", *VARIANTS[candidate.variant].accum):
            raise ValueError(f"{candidate} is no variant")
    if point.mask not in MASKS or not isinstance(point.off, dict):
        raise ValueError(f"{given} is no point")
    return point


@functools.cache
def of_card(card: Capability) -> Calibration | None:
    """A card's calibration as `auto` uses it: read once, and never the cause of an error."""
    if card.device != "cuda":
        return None
    try:
        return load(card)
    except Ignored as ignored:
        LOG.warning("sageattention: calibration ignored: %s", ignored)
    return None


def state(card: Capability) -> str:
    """One line about a card's calibration, for `doctor`."""
    try:
        found = load(card)
    except Ignored as ignored:
        return f"ignored: {ignored}"
    return f"of {found.made_at}, {len(found.points)} calls timed ({path(card.name)})" if found else f"none; `{COMMAND}` makes one"
