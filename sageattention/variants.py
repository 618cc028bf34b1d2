"""What a user can name: seven variants, each with its numerics, its kernels and where it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from .kernels.family import KernelFamily, Tile, Tiles
from .kernels.mma import MMA_FP8, MMA_FP16, MMA_INT8
from .kernels.resident import RESIDENT_FP16
from .kernels.wgmma import WGMMA_FP8, WGMMA_FP8_SPARSE, WGMMA_FP8_WIDE, WGMMA_FP16, WGMMA_FP16_SPARSE, WGMMA_FP16_WIDE
from .numerics.scheme import FP8_FP16, FP8_FP32_WGMMA, FP16_FP32, FP16_FP32_MMA, FP16_FP32_TRITON, INT8_INT32, Scheme


class Candidate(NamedTuple):
    """A variant by its name, and the accumulator of its P·V (`pv_accum_dtype`), "" for the variant's default.

    Written "name" or "name:accumulator".
    """

    variant: str
    accum: str = ""

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """What `str` gave."""
        name, _, accum = text.partition(":")
        return cls(name, accum)

    def __str__(self) -> str:
        return f"{self.variant}:{self.accum}" if self.accum else self.variant


@dataclass(frozen=True, eq=False)  # a row of the table, equal to itself only
class Variant:
    """One way to compute attention, as offered to the user.

    `archs` are the compute capabilities (as 10·major + minor) that have a fast path; empty means any device the backend
    reaches. A CUDA variant runs the first of its `kernels` that the device, the head dimension and the accumulator admit; `tiles`
    are the Triton kernel's launch shapes.
    """

    name: str
    backend: str  # "sdpa", "reference", "triton", "cuda"
    summary: str
    scheme: Scheme | None = None
    min_arch: int = 0
    archs: tuple[int, ...] = ()
    accum: dict[str, Scheme] = field(default_factory=dict)  # pv_accum_dtype → scheme, where the caller may choose; the default first
    tiles: Tiles = field(default_factory=dict)
    kernels: tuple[KernelFamily, ...] = ()
    sparse_kernels: tuple[KernelFamily, ...] = ()  # of block-sparse calls: by lists of tiles of 64 keys
    resident_kernels: tuple[KernelFamily, ...] = ()  # of calls with so few keys that K and V of a head stay in shared memory

    @property
    def has_kernels(self) -> bool:
        """Whether kernels of this package run it, not PyTorch's operators."""
        return self.backend in ("triton", "cuda")

    @property
    def schemes(self) -> dict[str, Scheme]:
        """All that it computes anywhere, by accumulator or kernels and accumulator."""
        own = {"default": self.scheme} if self.scheme else {}
        families = (*self.kernels, *self.resident_kernels)
        return own | self.accum | {f"{k.name}-{accum}": scheme for k in families for accum, scheme in k.schemes.items()}

    def choose(self, arch: int, forced: bool, head_dim: int, accum: str = "", sparse: bool = False) -> KernelFamily | None:
        """The kernels for a family of devices, of block-sparse calls or of others.

        One that is `forced` gets none of those that are made for one kind of device alone.
        """
        accum = accum or next(iter(self.accum))
        for k in self.sparse_kernels if sparse else self.kernels:
            if head_dim in k.head_dims and accum in k.schemes and (not k.arch or (k.arch == arch and not forced)):
                return k
        return None


SDPA = Variant("sdpa", "sdpa", "PyTorch's own scaled_dot_product_attention, unquantised")

REFERENCE = Variant(
    "reference", "reference", "the INT8 / FP16 numerics in plain PyTorch: any device, slow, for tests and demonstrations", FP16_FP32
)

TRITON_FP16 = Variant(
    "sageattn_qk_int8_pv_fp16_triton",
    "triton",
    "INT8 QK^T, FP16 PV with FP32 accumulation, in Triton: any card that Triton supports",
    FP16_FP32_TRITON,
    min_arch=75,
    tiles={
        (0, 64): Tile(128, 64, 4, 3),
        (0, 128): Tile(128, 64, 8, 2),
        (0, 256): Tile(64, 64, 8, 1),
        (75, 64): Tile(64, 64, 4, 2),
        (75, 128): Tile(64, 64, 4, 2),
        (75, 256): Tile(32, 32, 4, 1),
        (90, 64): Tile(64, 128, 4, 3),
        (90, 128): Tile(64, 128, 4, 2),
        (90, 256): Tile(64, 64, 4, 2),
    },
)

CUDA_FP16 = Variant(
    "sageattn_qk_int8_pv_fp16_cuda",
    "cuda",
    "INT8 QK^T, FP16 PV: overflow-safe, the most accurate CUDA variant",
    FP16_FP32_MMA,
    min_arch=75,
    accum=MMA_FP16.schemes,
    kernels=(WGMMA_FP16, WGMMA_FP16_WIDE, MMA_FP16),
    sparse_kernels=(WGMMA_FP16_SPARSE, MMA_FP16),
    resident_kernels=RESIDENT_FP16,
)
CUDA_FP8 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda",
    "cuda",
    "INT8 QK^T, FP8 PV for Ada and Blackwell",
    FP8_FP16,
    min_arch=89,
    accum=MMA_FP8.schemes,
    kernels=(MMA_FP8,),
    sparse_kernels=(MMA_FP8,),
)
CUDA_FP8_SM90 = Variant(
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "cuda",
    "INT8 QK^T, FP8 PV for Hopper",
    FP8_FP32_WGMMA,
    min_arch=90,
    archs=(90,),
    accum=WGMMA_FP8.schemes,
    kernels=(WGMMA_FP8, WGMMA_FP8_WIDE, MMA_FP8),
    sparse_kernels=(WGMMA_FP8_SPARSE, MMA_FP8),
)
CUDA_INT8 = Variant(
    "sageattn_qk_int8_pv_int8_cuda",
    "cuda",
    "both products in INT8: the fastest on GeForce cards, by their rates",
    INT8_INT32,
    min_arch=75,
    accum=MMA_INT8.schemes,
    kernels=(MMA_INT8,),
    sparse_kernels=(MMA_INT8,),
)

VARIANTS: dict[str, Variant] = {v.name: v for v in (SDPA, REFERENCE, TRITON_FP16, CUDA_FP16, CUDA_FP8, CUDA_FP8_SM90, CUDA_INT8)}


def settled(candidate: Candidate) -> Candidate:
    """The same candidate, its accumulator unsaid where that is the variant's default."""
    accums = VARIANTS[candidate.variant].accum
    return Candidate(candidate.variant) if candidate.accum == next(iter(accums), "") else candidate
