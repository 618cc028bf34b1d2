"""What `auto` runs: one table of rules. The first rule that holds for a call names the variants to try, best first; SDPA ends each.

A rule rests on a measurement (docs/kernels.md) or on the static model: the tensor cores' rates (docs/kernels.md), which say how much
less time both products take than in 16-bit attention. The fastest variant goes first, whatever its rounding costs within the bounds of
`workloads.KINDS`; who prefers another one names it. A variant without a kernel here is passed by, with the reason.
What `bench --calibrate` measured on the very card goes before the table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..device.capability import Capability
from ..numerics.constants import HEAD_DIMS, pad_head_dim
from ..variants import CUDA_FP8, CUDA_FP8_SM90, CUDA_FP16, CUDA_INT8, TRITON_FP16, Candidate
from .problem import Problem

if TYPE_CHECKING:
    from .calibration import Calibration

# Queries and keys from which a rule holds unless it says otherwise: below, quantising costs more than it saves.
MIN_TOKENS = 1024
# Queries a block of an attention kernel takes; a rule's `waves` are such blocks per multiprocessor.
BLOCK = 128

# Cards of compute capability 7.5 without tensor cores (TU116, TU117): an MMA runs there, at a fiftieth of the rate. CUDA has no
# attribute for it, so the name has to tell.
NO_TENSOR_CORES = r"\bGTX 16\d\d|\bMX[45]50\b|\b[TP]?T(400|500|550|600|1000|1200|2000)\b"


# What a decision rests on, in words.
BASIS = {"measured": "measured", "static": "by its data sheet, not measured"}


@dataclass(frozen=True)
class Rule:
    """One row: the calls it is for, and what they run.

    Attributes:
        archs: the families (compute capabilities) it is for.
        candidates: best first; SDPA comes after them, so where there is none SDPA runs.
        basis: a key of `BASIS`.
        reason: in a few words, for `explain`.
        head_dims: the compiled head dimensions it is for.
        masks: "none", "causal" or "list".
        min_q, min_kv: the shortest lengths, in tokens.
        key_masks: of dense masks only bool ones with one row for all queries, whose hidden keys cost nothing.
        waves: blocks of queries, over all heads, for each multiprocessor. One wave of the shortest call saves about what the
            quantising launches cost (20 µs).
        cards: a pattern that the card's name has to contain; "" is any card.
    """

    archs: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    basis: str
    reason: str
    head_dims: tuple[int, ...] = HEAD_DIMS
    masks: tuple[str, ...] = ("none", "causal", "list")
    min_q: int = MIN_TOKENS
    min_kv: int = MIN_TOKENS
    key_masks: bool = False
    waves: float = 2.0
    cards: str = ""

    def miss(self, problem: Problem, card: Capability) -> str:
        """Why it is not for this call, its lengths last; "" where it is."""
        head_dim = pad_head_dim(problem.head_dim)
        if head_dim not in self.head_dims:
            return f"no variant is faster at head_dim {head_dim}"
        if problem.mask_kind not in self.masks:
            return f"no variant is faster with a mask of the kind {problem.mask_kind!r}"
        if self.key_masks and (problem.mask != "bool" or problem.mask_shape[2] > 1 or problem.causal):
            return f"at head_dim {head_dim} no variant is surely faster with another dense mask than a bool one of keys alone"
        for given, least, what in ((problem.len_q, self.min_q, "queries"), (problem.len_kv, self.min_kv, "keys")):
            if given < least:
                return f"under {least:,} {what} quantising costs more than it saves"
        if waves(problem, card) < self.waves:
            return "too few heads and queries to fill the card: quantising costs more than it saves"
        return ""

    def __str__(self) -> str:
        archs = ", ".join(f"sm_{arch}" for arch in self.archs)
        lengths = f", from {self.min_q:,} queries and {self.min_kv:,} keys" if self.candidates else ""
        return f"rule for {archs}{lengths}: {self.reason} ({BASIS[self.basis]})"


@dataclass(frozen=True)
class Choice:
    """What a call should try, best first and without SDPA, which comes last; `reason` is the row that decided."""

    candidates: tuple[Candidate, ...]
    reason: str
    basis: str  # of the row: "measured", "static", "calibrated", or "" where none applied
    rejected: tuple[tuple[Candidate, str], ...] = ()  # looked at and known to be no gain


_ACCURATE, _FAST16, _FAST8 = Candidate(CUDA_FP16.name), Candidate(CUDA_FP16.name, "fp16+fp32"), Candidate(CUDA_FP8.name, "fp32+fp16")
_HOPPER8, _INT8, _TRITON = Candidate(CUDA_FP8_SM90.name), Candidate(CUDA_INT8.name), Candidate(TRITON_FP16.name)

RULES: tuple[Rule, ...] = (
    Rule((75,), (), "static", "this card has no tensor cores", cards=NO_TENSOR_CORES),
    # No Triton: it has no INT8 product for 7.5.
    Rule((75,), (_INT8, _FAST16), "static", "INT8 products at four times the rate of fp16 with fp32 sums"),
    Rule((80,), (_INT8, _ACCURATE, _TRITON), "static", "INT8 products at twice the rate of fp16"),
    Rule((86,), (_INT8, _FAST16, _TRITON), "static", "INT8 products at four times the rate of fp16 with fp32 sums"),
    # FP8 with fp16 sums has the same rate and more instructions around it (docs/kernels.md), and rounds more.
    Rule(
        (89, 120), (_INT8, _FAST8, _FAST16, _TRITON), "static",
        "INT8 and FP8 products at four times the rate of fp16 with fp32 sums",
    ),
    # Whole calls, cuDNN = 1, FP8: at 4,096 to 4,608 tokens 1.32 to 1.47 at head_dim 128, 1.21 at 64 and 1.32 at 40. Causal, torch's
    # best = 1: 1.07 to 1.12 at 4,096 to 4,608 tokens, 1.26 and 1.30 at 8,192, 1.45 at 16,384; .95 at 3,072, .77 at 2,048.
    Rule(
        (90,), (_HOPPER8, _ACCURATE), "measured", "INT8 and FP8 products by wgmma, faster than cuDNN quantising included",
        (64, 128), ("none", "causal"), min_q=4096, min_kv=4096,
    ),
    # Whole calls, torch = 1, FP8, at 4,608 tokens: 1.9 to 2.6 where whole tiles of keys are masked, 1.03 to 1.2 where none is. At
    # head_dim 64 and 4,096 tokens 1.67 with a mask of keys, 1.98 with one of text, but .82 where every tile is masked.
    Rule(
        (90,), (_HOPPER8, _ACCURATE), "measured", "masked tiles are left out, and torch has no fast masked kernel",
        (128,), ("list",), min_q=4096, min_kv=4096,
    ),
    Rule(
        (90,), (_HOPPER8, _ACCURATE), "measured", "masked keys cost nothing, and torch has no fast masked kernel",
        (64,), ("list",), min_q=4096, min_kv=4096, key_masks=True,
    ),
    # mma.sync, all that we have for it, reaches a part of what cuDNN's tcgen05 kernels do.
    Rule((100,), (), "static", "cuDNN uses tensor memory, which no variant does"),
)  # fmt: skip
FAMILIES = tuple(sorted({arch for rule in RULES for arch in rule.archs}))


def choose(problem: Problem, card: Capability, arch: int, calibration: Calibration | None = None) -> Choice:
    """What to try for a call on a card, whose kernel family is `arch`. The card's calibration goes before the rules."""
    beyond = problem.beyond_variants
    if beyond is not None:
        return Choice((), f"no variant takes it: {beyond}", "")
    if card.device != "cuda":
        return Choice((), f"on {card.device} tensors quantising gains nothing", "")
    if problem.needs_grad:
        return Choice((), "a gradient is asked for, and quantised attention has none", "")
    point = calibration.point(problem) if calibration and arch == card.arch else None
    if calibration and point:
        return Choice(tuple(point.faster()), f"calibration of {calibration.made_at}, at {point}", "calibrated", tuple(point.slower()))
    miss = ""
    for rule in rules(arch, card.name):
        why = rule.miss(problem, card)
        if not why:
            return Choice(rule.candidates, str(rule), rule.basis)
        if not miss or (pad_head_dim(problem.head_dim) in rule.head_dims and problem.mask_kind in rule.masks):
            miss = why
    return Choice((), miss, "")


def rules(arch: int, card: str) -> list[Rule]:
    """The rows for a card, by its architecture and name."""
    mine = family(arch)
    named = [rule for rule in RULES if mine in rule.archs and re.search(rule.cards, card)]
    return [rule for rule in named if rule.cards] or named


def family(arch: int) -> int:
    """The newest compute capability that the table knows and that is not above `arch`."""
    return max((known for known in FAMILIES if known <= arch), default=FAMILIES[0])


def waves(problem: Problem, card: Capability) -> float:
    """Blocks of queries for each multiprocessor; infinite where their number is not known."""
    blocks = problem.batch * problem.heads_q * -(-problem.len_q // BLOCK)
    return blocks / card.multiprocessors if card.multiprocessors else float("inf")
