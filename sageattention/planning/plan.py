"""`plan()`: from a problem and a machine to the variant that runs it. Pure and cached: no tensors, no CUDA."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..device.capability import Capability
from ..errors import KernelMissing, Unsupported
from ..kernels import binaries, store
from ..kernels.binaries import Image
from ..kernels.family import KernelFamily, Tile, find_tile
from ..kernels.table import IMAGES
from ..numerics.constants import HEAD_DIMS, pad_head_dim
from ..numerics.scheme import Scheme
from ..variants import SDPA, VARIANTS, Variant
from . import rules
from .problem import Problem
from .tile_lists import MAX_WORDS, WORD_BITS, tile_list_shape

if TYPE_CHECKING:
    from .calibration import Calibration

# Quantised K and V of at most this many bytes live at once; more heads than fit are done in groups. CUDA variants keep two groups
# alive: one is quantised while the other is attended. The rest of their 128 MiB are statistics.
WORKSPACE_LIMIT = {"triton": 256 << 20, "cuda": 126 << 20}
GROUPS_ALIVE = {"triton": 1, "cuda": 2}


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
    basis: str = ""  # what "auto" decided by: see `rules.Choice`
    accum: str = ""  # the `pv_accum_dtype`, "" the variant's default
    auto: bool = False  # "auto" chose: another candidate may take its place
    kernels: KernelFamily | None = None  # of a CUDA variant
    images: tuple[Image, Image] | None = None  # their quantisers' and the attention's
    attend: str = ""  # the attention kernel's symbol


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem, capability: Capability, variant: str = "auto", accum: str = "", arch: int = 0,
    calibration: Calibration | None = None, ptx: bool = False, absent: tuple[tuple[str, str], ...] = (),
) -> Plan:  # fmt: skip
    """Choose the variant, tile and grouping for a problem.

    Args:
        problem: the checked call.
        capability: the device it will run on.
        variant: a name from `variants.VARIANTS`, or "auto".
        accum: the `pv_accum_dtype`, where the variant offers several; "" is its default. "auto" has its own; with one asked for it
            looks at the variants that have it first.
        arch: forces a kernel family (as `SAGEATTENTION_ARCH` does); 0 is the device's own. Kernels that are made for one kind of
            device alone run only where nothing is forced.
        calibration: the device's, for "auto".
        ptx: only kernels that the driver compiles.
        absent: (candidate, reason) of those whose kernels turned out to be missing when "auto" called for them.

    Raises:
        Unsupported: the variant cannot do this problem on this device.
        KernelMissing: the variant can, but its kernel is not in this installation.
    """
    if variant != "auto":
        if variant not in VARIANTS:
            raise Unsupported("variant", f"got {variant!r}, accepted are 'auto', {', '.join(map(repr, VARIANTS))}")
        return replace(_fit(problem, capability, VARIANTS[variant], accum, arch, ptx, "asked for by name"), accum=accum)
    choice = rules.choose(problem, capability, arch or capability.arch, calibration)
    order, reason = [candidate.partition(":")[::2] for candidate in choice.order], choice.reason
    if accum:
        order, reason = _narrowed(order, accum), f"{reason}; pv_accum_dtype {accum!r} is asked for"
    rejected = list(choice.rejected)
    for name, own in order:
        candidate = f"{name}:{own}".rstrip(":")
        if candidate in dict(absent):
            rejected.append((candidate, dict(absent)[candidate]))
            continue
        try:
            chosen = _fit(problem, capability, VARIANTS[name], own, arch, ptx, reason)
        except (Unsupported, KernelMissing) as error:
            rejected.append((candidate, str(error)))
            continue
        if accum and own != accum:
            chosen = replace(chosen, reason=f"{reason}, and no variant that runs here has it")
        return replace(chosen, rejected=tuple(rejected), basis=choice.basis, accum=own, auto=True)
    reason = f"nothing is left of the {choice.reason}" if choice.order else choice.reason
    return Plan(SDPA, reason, tuple(rejected), arch or capability.arch, basis=choice.basis, auto=True)


def _narrowed(order: list[tuple[str, str]], accum: str) -> list[tuple[str, str]]:
    """The candidates (variant, accumulator) that can have the accumulator `accum`, with it, before all as they were."""
    having = dict.fromkeys((name, accum) for name, _ in order if accum in VARIANTS[name].accum)
    return [*having, *(candidate for candidate in order if candidate not in having)]


def refusal(variant: Variant, capability: Capability, arch: int = 0, ptx: bool = False) -> Unsupported | KernelMissing | None:
    """Why `variant` cannot run on a machine whatever the call is, or None where it can. `arch` and `ptx` as for `plan`."""
    family = arch or capability.arch
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
            return Unsupported("q", f"{variant.name} needs a tensor on an NVIDIA GPU{extra}, not on {capability.device}")
        if family < variant.min_arch:
            needs = f"needs sm_{variant.min_arch} or newer, not sm_{family}"
            return Unsupported("q", f"{variant.name} {needs}; {_nearest(variant, family)}")
        if variant.archs and family not in variant.archs:
            only = f"is made for {_archs(variant.archs)} only, not for sm_{family}"
            return Unsupported("q", f"{variant.name} {only}; {_nearest(variant, family)}")
    if variant.backend == "cuda":
        kernels = next((k for d in HEAD_DIMS if (k := variant.choose(family, bool(arch), d))), None)
        try:
            _images(variant, kernels, kernels.head_dims[0] if kernels else 0, capability, arch, ptx)
        except KernelMissing as error:
            return error
    return None


def _images(
    variant: Variant, kernels: KernelFamily | None, head_dim: int, capability: Capability, arch: int, ptx: bool = False
) -> tuple[Image, Image]:
    """The images that the device runs: the quantisers' and the attention's.

    Raises:
        KernelMissing: the table has none for the device, or its file is missing.
    """
    family, found = arch or capability.arch, []
    for name in (kernels.quantizer, kernels.attend_image(head_dim)) if kernels else ():
        image = binaries.select(IMAGES, name, capability.arch, arch, ptx)
        if image is None:
            built = ", ".join(binaries.describe(IMAGES, name))
            raise KernelMissing(variant.name, f"{name} exists for {built}; none of them runs on sm_{capability.arch} as sm_{family}")
        if absent := store.missing(image):
            raise KernelMissing(variant.name, f"sm_{family}: {absent}")
        found.append(image)
    if not found:
        raise KernelMissing(variant.name, f"this installation holds no kernel of it for sm_{family}; choose 'auto' or another variant")
    return found[0], found[1]


def _fit(problem: Problem, capability: Capability, variant: Variant, accum: str, arch: int, ptx: bool, reason: str) -> Plan:
    scheme, family = variant.scheme, arch or capability.arch
    if accum:
        if accum not in variant.accum:
            raise Unsupported("pv_accum_dtype", f"got {accum!r}, {variant.name} accepts {', '.join(map(repr, variant.accum))}")
        scheme = variant.accum[accum]
    error = (problem.beyond_variants if scheme is not None else None) or refusal(variant, capability, arch, ptx)
    if error is not None:
        raise error
    if scheme is None:
        return Plan(variant, reason, arch=family)
    if problem.needs_grad:
        lacks = f"{variant.name} has no backward pass and no forward mode"
        raise Unsupported("q", f"a gradient is asked for; {lacks} (under torch.no_grad() and without tangents it runs)")
    head_dim = pad_head_dim(problem.head_dim)
    if variant.backend == "triton":
        tile = find_tile(variant.tiles, family, head_dim)
        per_key = scheme.kv_bytes(head_dim) + 4  # K's scale
        heads = _heads_per_group(problem, WORKSPACE_LIMIT["triton"], GROUPS_ALIVE["triton"], tile.block_n * per_key, tile.block_n)
        return Plan(variant, reason, (), family, head_dim, tile, replace(scheme, kv_tile=tile.block_n), heads)
    if variant.backend == "cuda":
        kernels = variant.choose(family, bool(arch), head_dim, accum)
        found = _images(variant, kernels, head_dim, capability, arch, ptx)
        scheme = kernels.schemes[accum or next(iter(variant.accum))]
        mask = problem.mask_kind
        tile = find_tile(kernels.tiles, found[1].tiles_of, head_dim, mask, scheme.accumulate)
        limit = WORKSPACE_LIMIT["cuda"] - _tile_list_bytes(problem, variant, kernels.tile_bytes(head_dim), tile.block_n)
        heads = _heads_per_group(problem, limit, GROUPS_ALIVE["cuda"], kernels.tile_bytes(head_dim), tile.block_n)
        symbol = kernels.attend_symbol(head_dim, mask, scheme.accumulate)
        scheme = replace(scheme, kv_tile=tile.block_n)
        return Plan(variant, reason, (), family, head_dim, tile, scheme, heads, kernels=kernels, images=found, attend=symbol)
    return Plan(variant, reason, (), family, head_dim, scheme=scheme)


def _tile_list_bytes(problem: Problem, variant: Variant, tile_bytes: int, tile: int) -> int:
    """The workspace that a dense mask takes beside quantised K and V; 0 without one.

    Raises:
        Unsupported: the mask's bits leave no room for K and V, or there are more keys than the lists can name.
    """
    if problem.mask_kind != "list":
        return 0
    shape, limit = tile_list_shape(problem, problem.len_kv, tile), WORKSPACE_LIMIT["cuda"]
    if shape.words > MAX_WORDS:
        most = MAX_WORDS * WORD_BITS * tile
        accepted = f"{variant.name} takes a mask of at most {most:,}, and more keys without one"
        raise Unsupported("attn_mask", f"goes over {problem.len_kv:,} keys; {accepted}")
    alive = min(GROUPS_ALIVE["cuda"], problem.batch * problem.heads_kv) * -(-problem.len_kv // tile) * tile_bytes
    room = limit - min(alive, limit // 2)  # one head's K and V may be more than that by themselves
    if shape.size > room:
        taken = f"its lists and bits take {shape.size >> 20:,} MiB beside K and V, for which {variant.name} has {room >> 20:,}"
        raise Unsupported("attn_mask", f"{taken}; accepted is a smaller one, such as one that broadcasts over heads or queries")
    return shape.size


def _heads_per_group(problem: Problem, limit: int, alive: int, tile_bytes: int, tile: int) -> int:
    """Key/value heads, over all batches, of a group: `alive` groups fit into `limit` bytes, quantised; groups are of even size."""
    heads, per_head = problem.batch * problem.heads_kv, -(-problem.len_kv // tile) * tile_bytes
    if problem.varlen or heads * per_head <= limit:
        return heads
    groups = -(-heads // max(1, limit // (alive * per_head)))
    return -(-heads // groups)


def _nearest(variant: Variant, arch: int) -> str:
    """What of the same kind, P and V in one type before another, an sm_`arch` device can run, in words."""
    able = [v for v in VARIANTS.values() if v.backend == "cuda" and arch >= v.min_arch and (not v.archs or arch in v.archs)]
    nearest = min(able, key=lambda v: (v.scheme.pv != variant.scheme.pv, v.scheme.v_bits != variant.scheme.v_bits), default=SDPA)
    return f"the nearest that runs there is {nearest.name}"


def _archs(archs: tuple[int, ...]) -> str:
    return ", ".join(f"sm_{a}" for a in archs)
