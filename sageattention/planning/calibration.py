"""What `python -m sageattention bench --calibrate` measured on a card, kept in the user's cache directory. No CUDA at import.

    {"format": 2, "made_for": {"card", "arch", "multiprocessors", "driver", "torch", "sageattention"}, "made_at": "2026-11-22 16:00",
     "points": [{"form": {"heads", "heads_kv", "len_q", …}, "ms": {"sdpa": …, "variant[:pv_accum_dtype]": …}, "off": {…: reason},
                 "weight"}]}

`auto` reads a card's file once, when it first chooses for that card, and fits costs to its points. A file made for something else, or
one that can't be read, is ignored with one logged line; nothing here ever ends a run.
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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import _version, settings
from ..device import libcuda
from ..device.capability import Capability
from ..errors import CudaError
from ..numerics.constants import HEAD_DIMS
from ..variants import VARIANTS, Candidate, settled
from . import rules
from .cost import KINDS, RESIDENT, TORCH, Cost, Form, Kind, Way, Work, fit, work_of
from .ways import way_of

FOLDER = "SAGEATTENTION_CACHE"  # replaces the user's cache directory
FORMAT = 2
COMMAND = "python -m sageattention bench --calibrate"
# How far what calls without a mask have shown about a cost moves what is expected of those with one, as a factor.
CARRIED = 5.0

LOG = logging.getLogger("sageattention")
T = TypeVar("T")


class Ignored(Exception):
    """There is a calibration file that is of no use here; the message says why and what to do."""


@dataclass(frozen=True)
class Point:
    """One call that was timed: milliseconds of each candidate, torch's attention among them.

    `off` holds the candidates that were timed for nothing: reason by candidate. They are not chosen for calls of this kind. `weight` says
    how many times the call counts in a fit.
    """

    form: Form
    ms: dict[Candidate, float]
    off: dict[Candidate, str] = field(default_factory=dict)
    weight: float = 1.0

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        ms, off = ({str(candidate): value for candidate, value in found.items()} for found in (self.ms, self.off))
        return {"form": self.form._asdict(), "ms": ms, "off": off, "weight": self.weight}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Point:
        """What `as_json` gave.

        Raises:
            LookupError, TypeError, ValueError, AttributeError: it gave something else.
        """
        form, ms = Form(**given["form"]), times_from_json(given["ms"])
        sizes = [size for name, size in form._asdict().items() if name != "mask"]
        if not all(type(size) is int and size > 0 for size in sizes) or form.head_dim > HEAD_DIMS[-1] or form.kind not in KINDS:
            raise ValueError(f"{given['form']} is no call")
        if TORCH not in ms:
            raise ValueError("torch's own attention was not timed")
        if type(given["weight"]) not in (int, float) or not 0 < given["weight"] < 1e9:
            raise ValueError(f"{given['weight']} is no weight")
        return cls(form, ms, candidates_from_json(given["off"], str), given["weight"])


@dataclass(frozen=True, eq=False)  # compared, and hashed, by identity: plans are cached by it
class Calibration:
    """One card's points."""

    points: tuple[Point, ...]
    made_at: str
    _fitted: dict[tuple[Candidate, Kind, int, int], Cost] = field(default_factory=dict)

    def timed(self, kind: Kind) -> tuple[Candidate, ...]:
        """The candidates that were timed in calls of a kind."""
        return tuple(dict.fromkeys(candidate for point in self.points if point.form.kind == kind for candidate in point.ms))

    def cost(self, candidate: Candidate, kind: Kind, arch: int, multiprocessors: int) -> Cost:
        """What a candidate costs by its kernels of a kind, fitted once."""

        def prior(candidate: Candidate, kind: Kind) -> Cost:
            return rules.prior(candidate, kind, arch, multiprocessors)

        key = candidate, kind, arch, multiprocessors
        if key not in self._fitted:
            self._fitted[key] = fitted(self.points, candidate, kind, prior, arch, multiprocessors)
        return self._fitted[key]

    def off(self, kind: Kind) -> dict[Candidate, str]:
        """Reason by candidate of those whose results were wrong, or that could not run, in calls of a kind."""
        return {candidate: reason for point in self.points if point.form.kind == kind for candidate, reason in point.off.items()}


def fitted(
    points: Iterable[Point], candidate: Candidate, kind: Kind, prior: Callable[[Candidate, Kind], Cost], arch: int, multiprocessors: int
) -> Cost:
    """What a candidate costs by its kernels of a kind, by the calls that were timed.

    Calls with a mask are expected to differ from `prior` as those without one do.
    """

    def timed(kind: Kind) -> list[tuple[Work, float, float]]:
        alike = [(point, way) for point, way in ways if way.kind == kind]
        return [(work_of(point.form, way, multiprocessors), point.ms[candidate], point.weight) for point, way in alike]

    ways: list[tuple[Point, Way]] = [
        (point, way_of(candidate, point.form, arch, multiprocessors)) for point in points if candidate in point.ms
    ]
    expected, plain = prior(candidate, kind), (kind[0], "none")
    if kind[1] not in ("none", RESIDENT):
        before = prior(candidate, plain)
        after = fit(timed(plain), before)
        ratios = [min(max(a / b, 1 / CARRIED), CARRIED) if b else 1.0 for a, b in zip(after, before)]
        expected = Cost(*(cost * ratio for cost, ratio in zip(expected, ratios)))
    return fit(timed(kind), expected)


def candidates_from_json(given: dict[str, Any], value: Callable[[Any], T]) -> dict[Candidate, T]:
    """A mapping by candidate from one by their texts.

    Raises:
        AttributeError, LookupError, ValueError: it is none.
    """
    found = {}
    for name, item in given.items():
        candidate = Candidate.parse(name)
        if candidate.accum not in ("", *VARIANTS[candidate.variant].accum):
            raise ValueError(f"{candidate} is no variant")
        found[settled(candidate)] = value(item)
    return found


def times_from_json(given: dict[str, Any]) -> dict[Candidate, float]:
    """Milliseconds by candidate.

    Raises:
        AttributeError, LookupError, ValueError: these are none.
    """

    def time_of(ms: Any) -> float:
        if type(ms) not in (int, float) or not 0 < ms < 1e9:
            raise ValueError(f"{ms!r} is no time")
        return float(ms)

    return candidates_from_json(given, time_of)


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


def path(card: str, what: str = "calibration") -> Path:
    """The file of a card, by its name, for calibrations or something else."""
    return folder() / f"{what}-{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def place(card: str, what: str = "calibration") -> Path:
    """The same, in a folder that exists and can be written to.

    Raises:
        OSError: there can't be one.
    """
    file = path(card, what)
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
        "multiprocessors": str(card.multiprocessors),  # a part of a card is another card
        "driver": libcuda.driver_version(),
        "torch": torch.__version__,
        "sageattention": _version.__version__,
    }


def save(card: Capability, points: list[Point]) -> Path:
    """Write a card's file, whole or not at all.

    Raises:
        OSError: the folder can't be written.
    """
    file = write(card, "calibration", {"points": [point.as_json() for point in points]})
    forget()
    return file


def write(card: Capability, what: str, content: dict[str, Any]) -> Path:
    """Write a file for a card, with what it holds for, whole or not at all.

    Raises:
        OSError: the folder can't be written.
    """
    file = place(card.name, what)
    content = {"format": FORMAT, "made_for": made_for(card), "made_at": time.strftime("%Y-%m-%d %H:%M"), **content}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.stem)
    try:
        with open(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return file


def reset() -> list[Path]:
    """Delete every card's file; which ones those were.

    Raises:
        OSError: one can't be deleted.
    """
    files = remove("calibration")
    forget()
    return files


def remove(what: str) -> list[Path]:
    """Delete the files of every card, with what a killed `write` left.

    Raises:
        OSError: one can't be deleted.
    """
    files = sorted(folder().glob(f"{what}-*"))
    for file in files:
        file.unlink()
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

    def parse(content: dict[str, Any]) -> Calibration:
        return Calibration(tuple(map(Point.from_json, content["points"])), str(content["made_at"]))

    return read(card, "calibration", parse, f"`{COMMAND}` makes it anew, with --reset it goes")


def read(card: Capability, what: str, parse: Callable[[dict[str, Any]], T], again: str) -> T | None:
    """What `parse` makes of a card's file, or None where there is none. `again` says how to be rid of one that is no use.

    Raises:
        Ignored: it was made for something else, or can't be read.
    """
    file = path(card.name, what)
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
            return parse(content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Ignored(f"{file} is no {what} ({type(error).__name__}: {error}); {again}") from error
    except (libcuda.NoDriver, CudaError) as error:
        raise Ignored(f"{file} can't be checked: {error}") from error
    raise Ignored(f"{file} was made for {', '.join(other)}; {again}")


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
