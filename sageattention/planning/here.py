"""What the machine at hand runs: `plan()` under the environment, with the card's calibration, and without kernels found missing."""

from __future__ import annotations

import logging

from .. import settings
from ..device import capability
from ..device.capability import Capability
from ..errors import KernelMissing, Unsupported
from ..kernels import binaries
from ..memo import Memo
from ..variants import VARIANTS, Candidate
from . import calibration, verdicts
from .plan import Plan, Rejected, plan
from .problem import Problem
from .verdicts import Verdicts

LOG = logging.getLogger("sageattention")

# What "auto" chose for a problem and then could not have, as `plan` takes it: it is passed by from then on.
_absent: Memo[Problem, Rejected] = Memo()


def machine(problem: Problem) -> Capability:
    """The capability of the device a problem's tensors are on."""
    return capability.of_device(problem.device, problem.device_index)


def plan_for(problem: Problem, variant: str, accum: str = "") -> Plan:
    """`plan()` for the machine at hand, honouring `SAGEATTENTION_ARCH` and, for "auto", `SAGEATTENTION_VARIANT`.

    A variable that names no variant, or one that can't do this call, is told once, and "auto" chooses.
    """
    for name, given in (("variant", variant), ("pv_accum_dtype", accum)):
        if not isinstance(given, str):
            raise Unsupported(name, f"got {given!r}, accepted is a name")
    named = settings.read("SAGEATTENTION_VARIANT") if variant == "auto" else ""
    if named and named != "auto":
        try:
            return _plan_named(problem, named, accum)
        except (Unsupported, KernelMissing) as error:
            warn_once(f"SAGEATTENTION_VARIANT is {named!r}, which can't be had for this call, so 'auto' chooses: {error}")
    return _plan_here(problem, variant, accum)


def _plan_named(problem: Problem, variant: str, accum: str) -> Plan:
    """By the variant that the environment names; a call's own accumulator counts where that variant has it."""
    return _plan_here(problem, variant, accum if variant in VARIANTS and accum in VARIANTS[variant].accum else "")


def _plan_here(problem: Problem, variant: str, accum: str) -> Plan:
    card = machine(problem)
    known = calibration.of_card(card) if variant == "auto" else None
    arch, ptx = binaries.forced()
    return plan(problem, card, variant, accum, arch, known, ptx, _absent.get(problem, ()) if _absent else (), seen_on(card))


def seen_on(card: Capability) -> Verdicts | None:
    """What calls have shown on a card, where it is one whose kernels have to be verified."""
    arch, ptx = binaries.forced()
    needed = card.device == "cuda" and verdicts.needed(arch or card.arch)
    return verdicts.of_card(card, forced_kernels(arch, ptx)) if needed else None


def forced_kernels(arch: int, ptx: bool) -> str:
    """What `SAGEATTENTION_ARCH` asks for, "" where nothing: verdicts on such kernels say nothing about the card's own."""
    return f"{'compute' if ptx else 'sm'}_{arch}" if arch or ptx else ""


def plan_without(problem: Problem, chosen: Plan, error: KernelMissing) -> Plan:
    """What "auto" runs once the kernel of its choice was found missing.

    Raises:
        KernelMissing: `error`, where the variant was asked for by name.
    """
    if not chosen.auto:
        raise error
    candidate = Candidate(chosen.variant.name, chosen.accum)
    _absent[problem] = (*_absent.get(problem, ()), (candidate, error.reason))
    settings.planned_anew()
    warn_once(f"auto passes by {candidate}: {error.reason}")
    return plan_for(problem, "auto")


_told: set[str] = set()
MAX_TOLD = 64  # a message may name a shape, and a long session sees many shapes


def warn_once(message: str) -> None:
    """Log a warning, the first time that it is to be said; none after so many different ones."""
    if message in _told or len(_told) > MAX_TOLD:
        return
    _told.add(message)
    LOG.warning("sageattention: %s", message if len(_told) <= MAX_TOLD else "further warnings are not logged")
