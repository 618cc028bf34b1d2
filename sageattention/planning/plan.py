"""`plan()`: from a problem and a machine to the variant that runs it. Pure and cached: no tensors, no CUDA."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from ..device.capability import Capability
from ..errors import KernelMissing, Unsupported
from ..kernels import binaries, store
from ..kernels.binaries import Image
from ..kernels.family import KernelFamily, Tile, find_tile
from ..kernels.table import IMAGES
from ..numerics.constants import HEAD_DIMS, MAX_WORDS, pad_head_dim
from ..numerics.scheme import Scheme
from ..variants import SDPA, VARIANTS, Candidate, Variant, settled
from . import resident, rules
from .cost import GROUPS_ALIVE, WORKSPACE_LIMIT, Form
from .problem import Problem
from .tile_lists import WORD_BITS, tile_list_shape

if TYPE_CHECKING:
    from .calibration import Calibration
    from .verdicts import Verdicts

Rejected = tuple[tuple[Candidate, str], ...]


@dataclass(frozen=True, eq=False)  # `plan` is cached: a plan is equal to itself only
class Plan:
    """What a call will run, and why. As it is, a plan for PyTorch's own attention; each other backend has a type of its own.

    Attributes:
        arch: the kernel family: the device's compute capability, or a forced one.
        accum: the `pv_accum_dtype`, "" the variant's default.
        auto: "auto" chose: another candidate may take its place.
        basis: what "auto" decided by: see `rules.Choice`.
        rejected: each candidate that was looked at before the chosen one, and why it is not.
        predicted: milliseconds that "auto" expected of each candidate, SDPA among them.
        unverified: the chosen candidate, and the next one that "auto" would take, where nobody has seen yet that they are right and fast
            on this card: the call has to be verified. Empty where it need not be.
    """

    variant: Variant
    reason: str
    arch: int = 0
    accum: str = ""
    auto: bool = False
    basis: str = ""
    rejected: Rejected = ()
    predicted: tuple[tuple[Candidate, float], ...] = ()
    unverified: tuple[Candidate, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class EmulationPlan(Plan):
    """The numerics of `scheme` in plain PyTorch."""

    scheme: Scheme


@dataclass(frozen=True, eq=False, kw_only=True)
class KernelPlan(Plan):
    """Kernels that quantise K and V first, some heads at a time.

    Attributes:
        head_dim: the compiled, padded one.
        heads_per_group: key/value heads, over all batches, that are quantised and attended at once.
    """

    # Byte limit on the quantised K and V that exist at once, and the number of groups of heads that share it: a call whose heads exceed
    # the limit computes them group by group.
    WORKSPACE_LIMIT: ClassVar[int]
    GROUPS_ALIVE: ClassVar[int]
    COMPILES_AT_LAUNCH: ClassVar[bool]  # or all kernels of a call are there before its first launch

    scheme: Scheme
    head_dim: int
    tile: Tile
    heads_per_group: int

    @classmethod
    def grouped(cls, problem: Problem, tile_bytes: int, tile: int, beside: int = 0) -> int:
        """`heads_per_group` for tiles of `tile` keys, of `tile_bytes` quantised, with so many bytes beside them.

        Groups are of even size.
        """
        heads, per_head = problem.batch * problem.heads_kv, -(-problem.len_kv // tile) * tile_bytes
        limit = cls.WORKSPACE_LIMIT - beside
        if problem.varlen or heads * per_head <= limit:
            return heads
        groups = -(-heads // max(1, limit // (cls.GROUPS_ALIVE * per_head)))
        return -(-heads // groups)

    def halves_take(self, problem: Problem) -> int:
        """Bytes of quantised K and V that a call in two halves keeps beyond a whole one: it has all heads quantised at once."""
        heads = problem.batch * problem.heads_kv
        alive = min(heads, self.heads_per_group * self.GROUPS_ALIVE)
        return (heads - alive) * problem.len_kv * self.scheme.kv_bytes(self.head_dim)


@dataclass(frozen=True, eq=False, kw_only=True)
class TritonPlan(KernelPlan):
    """The Triton kernels."""

    WORKSPACE_LIMIT = 256 << 20
    GROUPS_ALIVE = 1
    COMPILES_AT_LAUNCH = True


@dataclass(frozen=True, eq=False, kw_only=True)
class CudaPlan(KernelPlan):
    """Kernels of a family, and where they are.

    Attributes:
        images: of the quantisers and of the attention.
        attend: the attention kernel's symbol.
        halves: where K and V stay in shared memory, which leaves nothing quantised behind: the plan of the same call in two halves, and
            of tensors whose rows are not aligned.
    """

    WORKSPACE_LIMIT = WORKSPACE_LIMIT
    GROUPS_ALIVE = GROUPS_ALIVE
    COMPILES_AT_LAUNCH = False

    kernels: KernelFamily
    images: tuple[Image, Image]
    attend: str
    halves: CudaPlan | None = None


class Target(NamedTuple):
    """The machine, as kernels are chosen for it.

    Attributes:
        forced: a kernel family (as `SAGEATTENTION_ARCH` forces it); 0 is the device's own. Kernels that are made for one kind of device
            alone run only where nothing is forced.
        ptx: only kernels that the driver compiles.
    """

    card: Capability
    forced: int = 0
    ptx: bool = False

    @property
    def family(self) -> int:
        return self.forced or self.card.arch


@functools.lru_cache(maxsize=4096)
def plan(
    problem: Problem, capability: Capability, variant: str = "auto", accum: str = "", arch: int = 0,
    calibration: Calibration | None = None, ptx: bool = False, absent: Rejected = (), verdicts: Verdicts | None = None,
) -> Plan:  # fmt: skip
    """Choose the variant, tile and grouping for a problem.

    Args:
        problem: the checked call.
        capability: the device it will run on.
        variant: a name from `variants.VARIANTS`, or "auto".
        accum: the `pv_accum_dtype`, where the variant offers several; "" is its default. "auto" has its own; with one asked for it
            looks at the variants that have it first.
        arch, ptx: see `Target`.
        calibration: the device's, for "auto".
        absent: (candidate, reason) of those whose kernels turned out to be missing when "auto" called for them.
        verdicts: what calls have shown on the device, where it is one that has to be verified.

    Raises:
        Unsupported: the variant cannot do this problem on this device.
        KernelMissing: the variant can, but its kernel is not in this installation.
    """
    target = Target(capability, arch, ptx)
    if variant != "auto":
        if variant not in VARIANTS:
            raise Unsupported("variant", f"got {variant!r}, accepted are 'auto', {', '.join(map(repr, VARIANTS))}")
        return _named(problem, target, Candidate(variant, accum), verdicts)
    choice = rules.choose(problem, capability, target.family, calibration, verdicts)
    candidates, reason = choice.candidates, choice.reason
    if accum:
        candidates, reason = _narrowed(candidates, accum), f"{reason}; pv_accum_dtype {accum!r} is asked for"
    rejected, missing, predicted = list(choice.rejected), dict(absent), tuple(choice.predicted.items())
    candidates = tuple(c for c in candidates if settled(c) not in dict(rejected))
    for place, candidate in enumerate(candidates):
        if candidate in missing:
            rejected.append((candidate, missing[candidate]))
            continue
        try:
            chosen = _fit(problem, target, candidate, reason)
        except (Unsupported, KernelMissing) as error:
            rejected.append((candidate, error.reason if isinstance(error, KernelMissing) else str(error)))  # the candidate is its subject
            continue
        if accum and candidate.accum != accum:
            chosen = replace(chosen, reason=f"{reason}, and no variant that runs here has it")
        unverified: tuple[Candidate, ...] = ()
        timed = choice.basis == "static" and not accum  # elsewhere times are known, and only results are compared
        if verdicts and (accum or choice.basis in ("static", "measured")) and _to_verify(problem, chosen, verdicts, timed):
            unverified = (candidate, *_next_to_verify(candidates[place + 1 :]))
        return replace(chosen, rejected=tuple(rejected), basis=choice.basis, auto=True, predicted=predicted, unverified=unverified)
    reason = f"nothing is left of what would gain: {choice.reason}" if choice.candidates else choice.reason
    return Plan(SDPA, reason, target.family, auto=True, basis=choice.basis, rejected=tuple(rejected), predicted=predicted)


def _named(problem: Problem, target: Target, candidate: Candidate, verdicts: Verdicts | None) -> Plan:
    """The plan of a variant that was asked for by name."""
    chosen = _fit(problem, target, candidate, "asked for by name")
    if verdicts is None or not chosen.variant.has_kernels:
        return chosen
    if off := verdicts.off.get(settled(candidate)):
        raise KernelMissing(candidate.variant, f"{off}; choose 'auto' or another variant")
    return replace(chosen, unverified=(candidate,)) if _to_verify(problem, chosen, verdicts) else chosen


def _to_verify(problem: Problem, chosen: Plan, verdicts: Verdicts, timed: bool = False) -> bool:
    candidate = Candidate(chosen.variant.name, chosen.accum)
    return not problem.varlen and not problem.empty and verdicts.wants(Form.of(problem), candidate, timed)


def _next_to_verify(candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
    """The second likeliest, if there is one: no Triton kernel, which takes longer to compile than a user would wait."""
    return tuple(c for c in candidates if VARIANTS[c.variant].backend == "cuda")[:1]


def _narrowed(candidates: tuple[Candidate, ...], accum: str) -> tuple[Candidate, ...]:
    """The candidates that can have the accumulator `accum`, with it, before all as they were."""
    having = dict.fromkeys(Candidate(name, accum) for name, _ in candidates if accum in VARIANTS[name].accum)
    return (*having, *(candidate for candidate in candidates if candidate not in having))


def _fit(problem: Problem, target: Target, candidate: Candidate, reason: str) -> Plan:
    """The plan of one variant for a problem.

    Raises:
        Unsupported, KernelMissing: as `plan`.
    """
    variant, accum = VARIANTS[candidate.variant], candidate.accum
    if accum and accum not in variant.accum:
        raise Unsupported("pv_accum_dtype", f"got {accum!r}, {variant.name} accepts {', '.join(map(repr, variant.accum))}")
    scheme = variant.accum[accum] if accum else variant.scheme
    if scheme is None:
        return Plan(variant, reason, target.family)
    error = problem.beyond_variants or refusal(variant, target.card, target.forced, target.ptx)
    if error is not None:
        raise error
    if problem.needs_grad:
        lacks = f"{variant.name} has no backward pass and no forward mode"
        raise Unsupported("q", f"a gradient is asked for; {lacks} (under torch.no_grad() and without tangents it runs)")
    if variant.backend == "reference":
        return EmulationPlan(variant, reason, target.family, accum, scheme=scheme)
    if variant.backend == "triton":
        return _fit_triton(problem, target, variant, accum, scheme, reason)
    return fit_cuda(problem, target, variant, accum, reason)


def _fit_triton(problem: Problem, target: Target, variant: Variant, accum: str, scheme: Scheme, reason: str) -> TritonPlan:
    head_dim = pad_head_dim(problem.head_dim)
    tile = find_tile(variant.tiles, target.family, head_dim)
    heads = TritonPlan.grouped(problem, tile.block_n * (scheme.kv_bytes(head_dim) + 4), tile.block_n)  # 4: K's scale
    return TritonPlan(
        variant, reason, target.family, accum,
        scheme=replace(scheme, kv_tile=tile.block_n), head_dim=head_dim, tile=tile, heads_per_group=heads,
    )  # fmt: skip


def fit_cuda(
    problem: Problem, target: Target, variant: Variant, accum: str, reason: str, sparse: bool = False
) -> CudaPlan:  # fmt: skip
    """The plan of a CUDA variant.

    Raises:
        KernelMissing: it has no kernels for the target.
    """
    head_dim, mask = pad_head_dim(problem.head_dim), "list" if sparse else problem.mask_kind
    kernels, images = _kernels(variant, target, head_dim, accum, sparse)
    scheme = kernels.schemes[accum or next(iter(variant.accum))]
    tile = find_tile(kernels.tiles, images[1].capability, head_dim, mask, scheme.accumulate)
    tile_bytes = kernels.tile_bytes(head_dim)
    heads = CudaPlan.grouped(problem, tile_bytes, tile.block_n, _tile_list_bytes(problem, variant, tile_bytes, tile.block_n))
    chosen = CudaPlan(
        variant, reason, target.family, accum,
        scheme=replace(scheme, kv_tile=tile.block_n), head_dim=head_dim, tile=tile, heads_per_group=heads,
        kernels=kernels, images=images, attend=kernels.attend_symbol(head_dim, mask, scheme.accumulate),
    )  # fmt: skip
    return chosen if sparse else _resident(problem, target, chosen)


def _resident(problem: Problem, target: Target, chosen: CudaPlan) -> CudaPlan:
    """The plan by which K and V of a head stay in shared memory, where they fit it, that pays and there is a kernel; else `chosen`."""
    variant, head_dim = chosen.variant, chosen.head_dim
    for kernels in variant.resident_kernels:
        scheme = kernels.schemes.get(chosen.accum or next(iter(variant.accum)))
        if scheme is None or kernels.arch != target.card.arch or target.forced or not resident.takes(kernels, problem):
            continue
        if not resident.pays(kernels, problem, target.card.multiprocessors):
            continue
        try:
            image = _image(variant, target, kernels.attend_image(head_dim))
        except KernelMissing:  # the others are as right
            continue
        tile = find_tile(kernels.tiles, image.capability, head_dim)
        return replace(
            chosen, kernels=kernels, images=(chosen.images[0], image), scheme=replace(scheme, kv_tile=tile.block_n), tile=tile,
            attend=kernels.attend_symbol(head_dim, problem.mask_kind, scheme.accumulate), halves=chosen,
        )  # fmt: skip
    return chosen


def _tile_list_bytes(problem: Problem, variant: Variant, tile_bytes: int, tile: int) -> int:
    """The workspace that a dense mask takes beside quantised K and V; 0 without one.

    Raises:
        Unsupported: the mask's bits leave no room for K and V, or there are more keys than the lists can name.
    """
    if problem.mask_kind != "list":
        return 0
    shape, limit = tile_list_shape(problem, problem.len_kv, tile), CudaPlan.WORKSPACE_LIMIT
    if shape.words > MAX_WORDS:
        most = MAX_WORDS * WORD_BITS * tile
        accepted = f"{variant.name} takes a mask of at most {most:,}, and more keys without one"
        raise Unsupported("attn_mask", f"goes over {problem.len_kv:,} keys; {accepted}")
    alive = min(CudaPlan.GROUPS_ALIVE, problem.batch * problem.heads_kv) * -(-problem.len_kv // tile) * tile_bytes
    room = limit - min(alive, limit // 2)  # one head's K and V may be more than that by themselves
    if shape.size > room:
        taken = f"its lists and bits take {shape.size >> 20:,} MiB beside K and V, for which {variant.name} has {room >> 20:,}"
        raise Unsupported("attn_mask", f"{taken}; accepted is a smaller one, such as one that broadcasts over heads or queries")
    return shape.size


def _kernels(
    variant: Variant, target: Target, head_dim: int, accum: str = "", sparse: bool = False
) -> tuple[KernelFamily, tuple[Image, Image]]:
    """The kernels that the device runs, and their images: the quantisers' and the attention's.

    Raises:
        KernelMissing: the table has none for the device, or a file is missing.
    """
    kernels = variant.choose(target.family, bool(target.forced), head_dim, accum, sparse)
    if kernels is None:
        lacks = f"this installation holds no kernel of it for sm_{target.family}"
        raise KernelMissing(variant.name, f"{lacks}; choose 'auto' or another variant")
    return kernels, (_image(variant, target, kernels.quantizer), _image(variant, target, kernels.attend_image(head_dim)))


def _image(variant: Variant, target: Target, name: str) -> Image:
    image = binaries.select(IMAGES, name, target.card.arch, target.forced, target.ptx)
    if image is None:
        built, machine = ", ".join(binaries.describe(IMAGES, name)), f"sm_{target.card.arch} as sm_{target.family}"
        raise KernelMissing(variant.name, f"{name} exists for {built}; none of them runs on {machine}")
    if absent := store.missing(image):
        raise KernelMissing(variant.name, f"sm_{target.family}: {absent}")
    return image


def refusal(variant: Variant, capability: Capability, arch: int = 0, ptx: bool = False) -> Unsupported | KernelMissing | None:
    """Why `variant` cannot run on a machine whatever the call is, or None where it can. `arch` and `ptx` as for `plan`."""
    target = Target(capability, arch, ptx)
    if variant.backend == "triton":
        return _triton_refusal(variant, target)
    if variant.backend == "cuda":
        return _cuda_refusal(variant, target)
    return None


def _triton_refusal(variant: Variant, target: Target) -> Unsupported | KernelMissing | None:
    mode = target.card.triton
    if mode == "none":
        return KernelMissing(variant.name, "Triton is not installed in this Python; install 'triton' (Windows: 'triton-windows')")
    if mode == "broken":
        return KernelMissing(variant.name, "Triton is installed but can't be imported; `python -m sageattention doctor` says why")
    return None if mode == "interpret" else _device_refusal(variant, target, ", or TRITON_INTERPRET=1 (slow, for tests)")


def _cuda_refusal(variant: Variant, target: Target) -> Unsupported | KernelMissing | None:
    error = _device_refusal(variant, target)
    if error is not None:
        return error
    some = next((d for d in HEAD_DIMS if variant.choose(target.family, bool(target.forced), d)), HEAD_DIMS[0])
    try:
        _kernels(variant, target, some)
    except KernelMissing as missing:
        return missing
    return None


def _device_refusal(variant: Variant, target: Target, otherwise: str = "") -> Unsupported | None:
    family = target.family
    if target.card.device != "cuda":
        return Unsupported("q", f"{variant.name} needs a tensor on an NVIDIA GPU{otherwise}, not on {target.card.device}")
    if family < variant.min_arch:
        needs = f"needs sm_{variant.min_arch} or newer, not sm_{family}"
        return Unsupported("q", f"{variant.name} {needs}; {_nearest(variant, family)}")
    if variant.archs and family not in variant.archs:
        only = f"is made for {', '.join(f'sm_{arch}' for arch in variant.archs)} only, not for sm_{family}"
        return Unsupported("q", f"{variant.name} {only}; {_nearest(variant, family)}")
    return None


def _nearest(variant: Variant, arch: int) -> str:
    """What of the same kind, P and V in one type before another, an sm_`arch` device can run, in words."""

    def distance(other: Variant) -> tuple[bool, ...]:
        mine, its = variant.scheme, other.scheme
        return (True,) if mine is None or its is None else (its.pv != mine.pv, its.v_bits != mine.v_bits)

    able = [v for v in VARIANTS.values() if v.backend == "cuda" and arch >= v.min_arch and (not v.archs or arch in v.archs)]
    return f"the nearest that runs there is {min(able, key=distance, default=SDPA).name}"
