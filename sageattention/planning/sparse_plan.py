"""Which variant runs a block-sparse call, and how. Pure and cached, as `plan` is."""

from __future__ import annotations

import functools

from ..device.capability import Capability
from ..errors import KernelMissing, Unsupported
from ..variants import REFERENCE, VARIANTS, Candidate
from . import rules
from .plan import Plan, Target, fit_cuda, refusal
from .sparse_problem import SparseProblem
from .verdicts import Verdicts


@functools.lru_cache(maxsize=4096)
def sparse_plan(
    sparse: SparseProblem, card: Capability, variant: str = "auto", arch: int = 0, ptx: bool = False, verdicts: Verdicts | None = None
) -> Plan:
    """The plan of a block-sparse call: a `CudaPlan`, or one of the `reference` variant. `arch`, `ptx` and `verdicts` as for `plan`.

    "auto" takes the first CUDA variant of the device's candidates that has a kernel; on a device without CUDA, `reference`.

    Raises:
        Unsupported: the variant is unknown, has no block-sparse form, can't run on this device or can't do this call.
        KernelMissing: its kernel is not in this installation, or was wrong on this card.
    """
    target, able = Target(card, arch, ptx), {name: v for name, v in VARIANTS.items() if v.backend in ("reference", "cuda")}
    if variant == "auto":
        return _automatic(sparse, target, verdicts)
    if variant not in able:
        raise Unsupported("variant", f"got {variant!r}, accepted of block-sparse calls are 'auto', {', '.join(map(repr, able))}")
    if verdicts and (off := verdicts.off.get(Candidate(variant))):
        raise KernelMissing(variant, f"{off}; choose 'auto' or another variant")
    return _fit(sparse, target, Candidate(variant), "asked for by name")


def _automatic(sparse: SparseProblem, target: Target, verdicts: Verdicts | None) -> Plan:
    if target.card.device != "cuda":
        return Plan(REFERENCE, "no kernels but for NVIDIA GPUs", target.family, auto=True)
    off, rejected = verdicts.off if verdicts else {}, []
    for candidate in rules.candidates(target.card, target.family):
        if not VARIANTS[candidate.variant].sparse_kernels:
            continue
        if candidate in off:
            rejected.append(f"{candidate}: {off[candidate]}")
            continue
        try:
            return _fit(sparse, target, candidate, "the first of its family by the static model")
        except (Unsupported, KernelMissing) as error:
            rejected.append(str(error))
    found = "; ".join(rejected) or f"no variant is for compute capability {target.family / 10}"
    raise KernelMissing("auto", f"no block-sparse kernel runs here: {found}; sageattn is dense, variant='reference' slow (plain PyTorch)")


def _fit(sparse: SparseProblem, target: Target, candidate: Candidate, reason: str) -> Plan:
    variant = VARIANTS[candidate.variant]
    error = refusal(variant, target.card, target.forced, target.ptx)
    if error is not None:
        raise error
    if variant is REFERENCE:
        return Plan(variant, reason, target.family)
    if sparse.problem.causal and sparse.q_start:
        accepted = "0, or variant='reference', which takes any"
        raise Unsupported("q_start", f"got {sparse.q_start}; of causal calls {variant.name} accepts {accepted}")
    return fit_cuda(sparse.problem, target, variant, candidate.accum, reason, sparse=True)
