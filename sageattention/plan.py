"""`plan()`: from a problem and a machine to the variant that runs it. Pure and cached: no tensors, no CUDA."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import auto, images, store
from .capability import Capability
from .errors import KernelMissing, Unsupported
from .problem import Problem
from .variants import HEAD_DIMS, IMAGES, SDPA, VARIANTS, Scheme, Tile, Variant, pad_head_dim

if TYPE_CHECKING:
    from .calibration import Calibration

# Quantised K and V of at most this many bytes live at once; more heads than fit are done in groups.
WORKSPACE_LIMIT = 256 << 20


@dataclass(frozen=True)
class Plan:
    """What a call will run, and why.

    `rejected` holds (variant, reason) for each candidate that was looked at before the chosen one.
    """

    variant: Variant
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()
    arch: int = 0  # the kernel family: the device's compute capability, or a forced one
    head_dim: int = 0  # compiled, padded head dimension
    tile: Tile | None = None
    scheme: Scheme | None = None
    heads_per_group: int = 0  # key/value heads (over all batches) quantised and attended at once
    basis: str = ""  # what "auto" decided by: see `auto.Choice`
    accum: str = ""  # the `pv_accum_dtype` that "auto" chose where it is not the variant's default


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem, capability: Capability, variant: str = "auto", accum: str = "", arch: int = 0, calibration: Calibration | None = None
) -> Plan:
    """Choose the variant, tile and grouping for a problem.

    Args:
        problem: the checked call.
        capability: the device it will run on.
        variant: a name from `variants.VARIANTS`, or "auto".
        accum: the `pv_accum_dtype`, where the variant offers several; "" is its default. "auto" has its own.
        arch: forces a kernel family (as `SAGEATTENTION_ARCH` does); 0 is the device's own.
        calibration: the device's, for "auto".

    Raises:
        Unsupported: the variant cannot do this problem on this device.
        KernelMissing: the variant can, but its kernel is not in this installation.
    """
    arch = arch or capability.arch
    if variant != "auto":
        if variant not in VARIANTS:
            raise Unsupported("variant", f"got {variant!r}, accepted are 'auto', {', '.join(map(repr, VARIANTS))}")
        return _fit(problem, capability, VARIANTS[variant], accum, arch, "asked for by name")
    choice = auto.choose(problem, capability, arch, calibration)
    rejected = list(choice.rejected)
    for candidate in choice.order:
        name, _, accum = candidate.partition(":")
        try:
            chosen = _fit(problem, capability, VARIANTS[name], accum, arch, choice.reason)
        except (Unsupported, KernelMissing) as error:
            rejected.append((candidate, str(error)))
            continue
        return replace(chosen, rejected=tuple(rejected), basis=choice.basis, accum=accum)
    reason = f"nothing is left of the {choice.reason}" if choice.order else choice.reason
    return Plan(SDPA, reason, tuple(rejected), arch, basis=choice.basis)


def refusal(variant: Variant, capability: Capability, arch: int = 0) -> Unsupported | KernelMissing | None:
    """Why `variant` cannot run on a machine whatever the call is, or None where it can."""
    arch = arch or capability.arch
    if variant.backend == "triton":
        if capability.triton == "none":
            return KernelMissing(variant.name, "Triton is not installed in this Python; install 'triton' (Windows: 'triton-windows')")
        if capability.triton == "broken":
            return KernelMissing(variant.name, "Triton is installed but can't be imported; `python -m sageattention doctor` says why")
        if capability.triton == "interpret":
            return None
    if variant.backend in ("triton", "cuda"):
        if capability.device != "cuda":
            extra = ", or TRITON_INTERPRET=1 (slow, for tests)" if variant.backend == "triton" else ""
            return Unsupported("q", f"is on {capability.device}; {variant.name} needs a tensor on an NVIDIA GPU{extra}")
        if arch < variant.min_arch:
            return Unsupported("q", f"is on an sm_{arch} device; {variant.name} needs sm_{variant.min_arch} or newer")
        if variant.archs and arch not in variant.archs:
            return Unsupported("q", f"is on an sm_{arch} device; {variant.name} is made for {_archs(variant.archs)} only")
    if variant.backend == "cuda":
        family = 0 if arch == capability.arch else arch
        image = images.select(IMAGES, f"{variant.image}{HEAD_DIMS[0]}", capability.arch, family) if variant.image else None
        if image is not None:
            absent = store.missing(image)
            return KernelMissing(variant.name, f"sm_{arch}: {absent}") if absent else None
        return KernelMissing(variant.name, f"this installation holds no kernel of it for sm_{arch}; choose 'auto' or another variant")
    return None


def _fit(problem: Problem, capability: Capability, variant: Variant, accum: str, arch: int, reason: str) -> Plan:
    scheme = variant.scheme
    if accum:
        if accum not in variant.accum:
            raise Unsupported("pv_accum_dtype", f"got {accum!r}, {variant.name} accepts {', '.join(map(repr, variant.accum))}")
        scheme = variant.accum[accum]
    error = refusal(variant, capability, arch)
    if error is not None:
        raise error
    if scheme is None:
        return Plan(variant, reason, arch=arch)
    if problem.needs_grad:
        raise Unsupported("q", f"a gradient is asked for; {variant.name} has no backward pass (under torch.no_grad() it runs)")
    head_dim = pad_head_dim(problem.head_dim)
    if not variant.tiles:
        return Plan(variant, reason, (), arch, head_dim, scheme=scheme)
    tile = variant.tile(arch, head_dim)
    return Plan(
        variant, reason, (), arch, head_dim, tile, replace(scheme, kv_tile=tile.block_n), _heads_per_group(problem, scheme, head_dim, tile)
    )


def _heads_per_group(problem: Problem, scheme: Scheme, head_dim: int, tile: Tile) -> int:
    """Key/value heads, over all batches, whose quantised K and V fit into `WORKSPACE_LIMIT`; groups are of even size."""
    heads = problem.batch * problem.heads_kv
    if problem.varlen or heads == 0 or problem.len_kv == 0:
        return heads
    tokens = -(-problem.len_kv // tile.block_n) * tile.block_n
    per_head = tokens * (head_dim + head_dim * scheme.v_bytes + 4)
    groups = -(-heads // max(1, WORKSPACE_LIMIT // per_head))
    return -(-heads // groups)


def _archs(archs: tuple[int, ...]) -> str:
    return ", ".join(f"sm_{a}" for a in archs)
