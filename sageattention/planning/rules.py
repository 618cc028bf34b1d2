"""What `auto` runs: of a family's candidates those that are predicted to be faster than PyTorch's attention, the fastest first.

Predictions are sums of costs (planning/cost.py): as measured on this very card (`bench --calibrate`), on a card of its architecture
(planning/measured.py), or by the data sheet of its architecture (planning/datasheet.py). The fastest goes first, whatever its rounding
costs within the bounds of `workloads.KINDS`; who prefers another one names it. A variant without a kernel here is passed by, with the
reason. On a card that nobody has timed, what a call of the kind showed (planning/verdicts.py) goes before predictions.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..device.capability import Capability
from ..numerics.constants import pad_head_dim
from ..variants import CUDA_FP8, CUDA_FP8_SM90, CUDA_FP16, CUDA_INT8, TRITON_FP16, Candidate
from . import datasheet, resident
from .cost import KINDS, RESIDENT, TORCH, Cost, Costs, Form, Kind, Way, work_of
from .measured import MEASURED
from .problem import Problem
from .ways import kinds_of, way_of

if TYPE_CHECKING:
    from .calibration import Calibration
    from .verdicts import Verdicts

# Cards of compute capability 7.5 without tensor cores (TU116, TU117): an MMA runs there, at a fiftieth of the rate. CUDA has no
# attribute for it, so the name has to tell.
NO_TENSOR_CORES = r"\bGTX 16\d\d|\bMX[45]50\b|\b[TP]?T(400|500|550|600|1000|1200|2000)\b"

# What a prediction rests on, in words, and how much faster than PyTorch's attention a variant has to look by it.
BASIS = {
    "measured": "measured on this architecture",
    "static": "by its data sheet, not measured",
    "calibrated": "measured on this card",
    "verified": "in the first long call of its kind here",
}
PACKED_RESIDENT = "K and V of a head stay in shared memory, which is faster than PyTorch's attention ({})"
MARGINS = {"measured": 1.02, "calibrated": 1.02, "static": 1.1, "verified": 1.02}

_ACCURATE, _FAST16, _FAST8 = Candidate(CUDA_FP16.name), Candidate(CUDA_FP16.name, "fp16+fp32"), Candidate(CUDA_FP8.name, "fp32+fp16")
_HOPPER8, _INT8, _TRITON = Candidate(CUDA_FP8_SM90.name), Candidate(CUDA_INT8.name), Candidate(TRITON_FP16.name)

# By family, in the order of the static model: equally fast ones are taken in it, and so are those of block-sparse calls.
CANDIDATES: dict[int, tuple[Candidate, ...]] = {
    75: (_INT8, _FAST16),  # no Triton: it has no INT8 product for 7.5
    80: (_INT8, _ACCURATE, _TRITON),
    86: (_INT8, _FAST16, _TRITON),
    # FP8 with fp16 sums has the rate of INT8 and more instructions around it (docs/kernels.md), and rounds more.
    89: (_INT8, _FAST8, _FAST16, _TRITON),
    90: (_HOPPER8, _ACCURATE, _INT8),
    100: (),  # mma.sync, all that we have for it, reaches a part of what cuDNN's tcgen05 kernels do
    120: (_INT8, _FAST8, _FAST16, _TRITON),
}
# Tokens of the longest packed sequence from which ours gain. Whole calls on an H200, head_dim 128, FP8, beside PyTorch's kernel for them
# (FlashAttention 2): 2.9 to 3.0 times as fast at 32,768 tokens, 2.2 at 4,608, 1.2 to 1.3 at 1,024; .7 to .8 at 100 to 700.
MIN_PACKED = 1024
# The same of kernels that keep K and V in shared memory, FP16, by compiled head dimension: at 128 they are 1.12 times as fast with 300
# tokens, 1.10 with 100 to 512, .47 with 64; at 64 1.34 with 600, .90 with 256.
MIN_PACKED_RESIDENT = {64: 512, 128: 300}
# PyTorch's kernels have no tensor-core product for fp32 operands but TF32's in several passes: at most at half the rate.
TORCH_FP32 = 2.0


@dataclass(frozen=True)
class Choice:
    """What a call should try, best first and without SDPA, which comes last.

    Attributes:
        reason: what decided, in a few words.
        basis: a key of `BASIS`, "" where nothing had to be predicted.
        rejected: what would have been looked at if its results were not wrong on this card, and how.
        predicted: milliseconds of each candidate, SDPA among them.
    """

    candidates: tuple[Candidate, ...]
    reason: str
    basis: str = ""
    rejected: tuple[tuple[Candidate, str], ...] = ()
    predicted: dict[Candidate, float] = field(default_factory=dict)


def choose(
    problem: Problem, card: Capability, arch: int, calibration: Calibration | None = None, verdicts: Verdicts | None = None
) -> Choice:
    """What to try for a call on a card, whose kernel family is `arch`. The card's calibration, then its verdicts, go before predictions."""
    beyond = problem.beyond_variants
    if beyond is not None:
        return Choice((), f"no variant takes it: {beyond}")
    if card.device != "cuda":
        return Choice((), f"on {card.device} tensors quantising gains nothing")
    if problem.needs_grad:
        return Choice((), "a gradient is asked for, and quantised attention has none")
    if problem.empty:
        return Choice((), "there is nothing to compute")
    if not has_tensor_cores(card):
        return Choice((), f"this card has no tensor cores ({BASIS['static']})", "static")
    if problem.mask_kind == "packed":
        return _of_packed(problem, card, arch)
    form = Form.of(problem)
    if calibration and arch == card.arch:
        off = calibration.off(form.kind)
    else:
        calibration, off = None, {}
    if verdicts:
        off = off | verdicts.off
        found = None if calibration else verdicts.of(form)
        if found and found.ms:
            choice = _ordered(found.ms, "verified", off)
            others = (c for c in faster(*predict(form, card, arch)) if c not in found.ms and c not in off)
            return replace(choice, candidates=(*choice.candidates, *others)) if choice.candidates else choice
    choice = _ordered(*predict(form, card, arch, calibration), off)
    if choice.candidates and _way(choice.candidates[0], form, card, arch).kind[1] == RESIDENT:
        return replace(choice, reason=f"{choice.reason}; K and V of a head stay in shared memory")
    return choice


def _of_packed(problem: Problem, card: Capability, arch: int) -> Choice:
    """By thresholds: PyTorch's kernel for packed sequences is another one than those that predictions are made of."""
    mine = family(arch)
    basis = "measured" if mine in MEASURED else "static"
    if arch == card.arch and _resident_gains(problem, card):
        return Choice((_ACCURATE,), PACKED_RESIDENT.format(BASIS[basis]), basis)
    if min(problem.len_q, problem.len_kv) < MIN_PACKED:
        return Choice((), f"under {MIN_PACKED:,} tokens PyTorch's kernel for packed sequences is faster ({BASIS[basis]})", basis)
    if mine in MEASURED and pad_head_dim(problem.head_dim) != 128:
        return Choice((), f"packed sequences of head_dim {problem.head_dim} were not timed ({BASIS[basis]})", basis)
    return Choice(CANDIDATES[mine], f"PyTorch's kernel for packed sequences is slower ({BASIS[basis]})", basis)


def _resident_gains(problem: Problem, card: Capability) -> bool:
    """Whether packed sequences have kernels that keep K and V in shared memory, and they are faster than PyTorch's. By thresholds."""
    return any(
        kernels.arch == card.arch
        and resident.takes(kernels, problem)
        and resident.pays(kernels, problem, card.multiprocessors)
        and min(problem.len_q, problem.len_kv) >= MIN_PACKED_RESIDENT[pad_head_dim(problem.head_dim)]
        for kernels in CUDA_FP16.resident_kernels
    )


def _ordered(predicted: dict[Candidate, float], basis: str, off: dict[Candidate, str]) -> Choice:
    torch_ms = predicted[TORCH]
    able = {candidate: ms for candidate, ms in predicted.items() if candidate not in off}
    gains = faster(able, basis)
    what = "measured" if basis == "verified" else "predicted"
    best = f"{_ms(able[gains[0]])} {what}, PyTorch's attention {_ms(torch_ms)}" if gains else f"no variant is {what} to gain"
    return Choice(gains, f"{best} ({BASIS[basis]})", basis, tuple(off.items()), predicted)


def faster(predicted: dict[Candidate, float], basis: str) -> tuple[Candidate, ...]:
    """Of candidates and their times, those that beat PyTorch's attention by the basis's margin, the fastest first."""
    limit = predicted[TORCH] / MARGINS[basis]
    return tuple(sorted((c for c, ms in predicted.items() if c != TORCH and ms < limit), key=predicted.__getitem__))


def _ms(ms: float) -> str:
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms:,.0f} ms"


def predict(form: Form, card: Capability, arch: int, calibration: Calibration | None = None) -> tuple[dict[Candidate, float], str]:
    """(milliseconds of SDPA and each candidate, the key of `BASIS`) for a call on a card whose kernel family is `arch`."""
    count, mine = _multiprocessors(card, arch), family(arch)
    timed = calibration.timed(form.kind) if calibration else ()
    costs, predicted = table(arch, count), {}
    for candidate in timed or (TORCH, *CANDIDATES[mine]):
        way = _way(candidate, form, card, arch)
        cost = calibration.cost(candidate, way.kind, arch, count) if calibration and timed else costs[way.kind][candidate]
        predicted[candidate] = cost.ms(work_of(form, way, count))
    if timed:
        return predicted, "calibrated"
    if form.itemsize > 2:
        predicted[TORCH] *= TORCH_FP32
    return predicted, "measured" if mine in MEASURED else "static"


def _way(candidate: Candidate, form: Form, card: Capability, arch: int) -> Way:
    """Where another family's kernels are forced, there are none of those that are made for one kind of device alone."""
    return way_of(candidate, form, arch if arch == card.arch else 0, _multiprocessors(card, arch))


def _multiprocessors(card: Capability, arch: int) -> int:
    return card.multiprocessors or datasheet.MULTIPROCESSORS[family(arch)]


@functools.cache
def table(arch: int, multiprocessors: int) -> Costs:
    """The costs of every kind of call on cards of a family: measured, or by the data sheet."""
    mine = family(arch)
    if mine in MEASURED:
        return MEASURED[mine]
    found: Costs = {}
    for kind in KINDS:
        for candidate in (TORCH, *CANDIDATES[mine]):
            for own in kinds_of(candidate, kind, mine):
                found.setdefault(own, {})[candidate] = datasheet.static_cost(mine, candidate, own, multiprocessors)
    return found


def prior(candidate: Candidate, kind: Kind, arch: int, multiprocessors: int) -> Cost:
    """What a candidate is expected to cost before anything was measured on the card."""
    known = table(arch, multiprocessors).get(kind, {}).get(candidate)
    return known or datasheet.static_cost(family(arch), candidate, kind, multiprocessors)


def candidates(card: Capability, arch: int) -> tuple[Candidate, ...]:
    """What a card's "auto" chooses from, whose kernel family is `arch`."""
    return CANDIDATES[family(arch)] if has_tensor_cores(card) else ()


def has_tensor_cores(card: Capability) -> bool:
    """False for the cards of 7.5 that have none."""
    return card.arch != 75 or not re.search(NO_TENSOR_CORES, card.name)


def family(arch: int) -> int:
    """The newest compute capability that there are candidates for and that is not above `arch`."""
    return max((known for known in CANDIDATES if known <= arch), default=min(CANDIDATES))
