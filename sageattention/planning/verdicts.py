"""What a card's own calls have shown about kernels that nobody could try on such a card. No CUDA at import.

The first long call of each class is computed by torch's attention and by the likeliest candidates (verify.py); what came of it is kept
beside the calibrations, so that it happens once for a card, its driver and the versions of torch and of this package:

    {"format", "made_for", "made_at" as a calibration's,
     "classes": [{"head_dim", "mask", "length", "ms": {candidate: …}, "right": [candidate, …]}], "off": {candidate: reason}}
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .. import settings
from ..device import libcuda
from ..device.capability import Capability
from ..errors import CudaError
from ..kernels.proven import proven
from ..variants import Candidate, settled
from . import calibration, rules
from .calibration import Ignored
from .cost import KINDS, TORCH, Form
from .measured import MEASURED

VARIABLE = "SAGEATTENTION_VERIFY"
# Pairs of a query and a key of a head: with fewer than SHORTEST a call tells nothing, and each class of length has 2^CLASS_BITS times those
# of the class before.
SHORTEST, CLASS_BITS = 1 << 16, 4

LOG = logging.getLogger("sageattention")


class Class(NamedTuple):
    """Calls that one verdict is for: the compiled head dimension, the kind of mask, and the length, a power of four of the tokens."""

    head_dim: int
    mask: str
    length: int

    @classmethod
    def of(cls, form: Form) -> Class | None:
        """None where the call is too short to tell anything."""
        pairs = form.len_q * form.len_kv
        return cls(*form.kind, (pairs // SHORTEST).bit_length() // CLASS_BITS) if pairs >= SHORTEST else None

    def __str__(self) -> str:
        shortest = int((SHORTEST << max(0, CLASS_BITS * self.length - 1)) ** 0.5)
        return f"head_dim {self.head_dim}, mask {self.mask}, from {shortest:,} tokens"


@dataclass(frozen=True)
class Verdict:
    """Of one class: milliseconds by candidate, torch's attention among them (empty: none was timed), and those whose result was right."""

    ms: dict[Candidate, float] = field(default_factory=dict)
    right: frozenset[Candidate] = frozenset()


@dataclass(frozen=True, eq=False)  # compared, and hashed, by identity: plans are cached by it
class Verdicts:
    """One card's; `off` has the candidates whose results were wrong, with the reason: they are out there."""

    classes: dict[Class, Verdict] = field(default_factory=dict)
    off: dict[Candidate, str] = field(default_factory=dict)
    made_at: str = ""

    def of(self, form: Form) -> Verdict | None:
        """The verdict that a call falls under."""
        found = Class.of(form)
        return self.classes.get(found) if found else None

    def wants(self, form: Form, candidate: Candidate, timed: bool) -> bool:
        """Whether a call that `candidate` was chosen for has to be verified, or `timed` as well."""
        if Class.of(form) is None:
            return False
        known = self.of(form)
        return known is None or settled(candidate) not in known.right or (timed and not known.ms)

    def plus(self, form: Form, verdict: Verdict, off: dict[Candidate, str]) -> Verdicts:
        """These, and what a call has shown."""
        found = Class.of(form)
        assert found is not None  # no other call is verified
        before = self.classes.get(found, Verdict())
        merged = Verdict(verdict.ms or before.ms, verdict.right | before.right)
        return Verdicts({**self.classes, found: merged}, {**self.off, **off}, self.made_at)


def needed(arch: int) -> bool:
    """Whether nobody has seen the kernels of a family run: its costs were not measured, or its images are others than those that the
    tests have passed with on a card. The environment may say no."""
    return not (rules.family(arch) in MEASURED and proven(rules.family(arch))) and settings.read(VARIABLE) != "0"


def of_card(card: Capability, kernels: str = "") -> Verdicts:
    """A card's, as `auto` uses them: read once, and never the cause of an error.

    Args:
        kernels: of which architecture, where that is forced; what they do says nothing about the card's own.
    """
    key = card, kernels
    if key not in _known:
        _known[key] = _read(card, kernels)
    return _known[key]


_known: dict[tuple[Capability, str], Verdicts] = {}


def add(card: Capability, kernels: str, form: Form, verdict: Verdict, off: dict[Candidate, str]) -> None:
    """Keep what a call has shown, in the file too if that can be written; calls are planned anew."""
    found = _known[card, kernels] = of_card(card, kernels).plus(form, verdict, off)
    settings.planned_anew()
    try:
        calibration.write(card, _what(kernels), _as_json(found))
    except (calibration.Ignored, OSError, libcuda.NoDriver, CudaError) as error:
        LOG.warning("sageattention: what was verified can't be kept, and will be verified again at the next start: %s", error)


def reset() -> list[Path]:
    """Delete every card's file; which ones those were.

    Raises:
        OSError: one can't be deleted.
    """
    files = calibration.remove("verified")
    forget()
    return files


def forget() -> None:
    """Let `auto` look again."""
    _known.clear()
    settings.planned_anew()


def _what(kernels: str) -> str:
    return f"verified-{kernels}" if kernels else "verified"


def _read(card: Capability, kernels: str) -> Verdicts:
    try:
        return calibration.read(card, _what(kernels), _from_json, "it is made anew") or Verdicts()
    except Ignored as ignored:  # another driver, another version: what was true then has to be found out again
        LOG.debug("sageattention: %s", ignored)
        return Verdicts()


def _as_json(found: Verdicts) -> dict[str, Any]:
    classes = [
        {**key._asdict(), "ms": {str(c): ms for c, ms in verdict.ms.items()}, "right": sorted(map(str, verdict.right))}
        for key, verdict in found.classes.items()
    ]
    return {"classes": classes, "off": {str(candidate): reason for candidate, reason in found.off.items()}}


def _from_json(content: dict[str, Any]) -> Verdicts:
    classes = {}
    for given in content["classes"]:
        key = Class(given["head_dim"], given["mask"], given["length"])
        ms = calibration.times_from_json(given["ms"])
        if key[:2] not in KINDS or type(key.length) is not int or (ms and TORCH not in ms):
            raise ValueError(f"{given} is no verdict")
        right = frozenset(calibration.candidates_from_json(dict.fromkeys(given["right"]), bool))
        classes[key] = Verdict(ms, right)
    return Verdicts(classes, calibration.candidates_from_json(content["off"], str), str(content["made_at"]))


def lines(card: Capability, arch: int, kernels: str = "") -> list[str]:
    """What was found on a card, whose kernel family is `arch`, for `doctor`."""
    if not needed(arch):
        off = settings.read(VARIABLE) == "0"
        return [f"off, by {VARIABLE}" if off else "not needed: these kernels were tried on a card of this architecture"]
    known = of_card(card, kernels)
    found = [f"{candidate} is out: {reason}" for candidate, reason in known.off.items()]
    for key, verdict in sorted(known.classes.items()):
        timed = ", ".join(f"{candidate} {ms:.3g} ms" for candidate, ms in sorted(verdict.ms.items(), key=lambda item: item[1]))
        found.append(f"{key}: {timed or ', '.join(sorted(map(str, verdict.right))) + ' right'}")
    return found or ["nothing yet; the first long call of each kind is"]
