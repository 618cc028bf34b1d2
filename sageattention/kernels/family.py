"""Families of CUDA kernels: the launch shape of each kernel, by card and head dimension, and the names of kernels and their images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..numerics.constants import HEAD_DIMS
from ..numerics.scheme import Scheme
from .binaries import Entry

MASKS = ("none", "causal", "list", "packed")
# Which keys a quantiser finds: all of a dense call, those that are live, those of packed sequences.
KEYS_SUFFIX = {"all": "", "live": "_live", "packed": "_packed"}
KEYS = tuple(KEYS_SUFFIX)
WARP_ROWS = 16  # of an MMA


@dataclass(frozen=True)
class Tile:
    """Launch shape of an attention kernel: queries and keys per block, warps, pipeline stages.

    CUDA kernels also say how many blocks of a multiprocessor the registers are budgeted for, whether shared memory holds Q's fragments
    (q_in_smem) or the loop's state, which is Q's scales and the number of the first tile (loop_state_in_smem), whether each tile computes
    the thread's index again instead of keeping it in a register, and how V's load is delayed until P is computed (1: by a fake address
    dependency on the row sum, 2: by __syncwarp). stage_tiles: KV tiles of a stage, of Hopper's own kernels.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    blocks: int = 1
    q_in_smem: bool = False
    loop_state_in_smem: bool = False
    recompute_thread_idx: bool = False
    delay_v_load: int = 0
    stage_tiles: int = 1


Tiles = dict[tuple[int | str, ...], Tile]


def find_tile(tiles: Tiles, arch: int, head_dim: int, *kind: str) -> Tile:
    """The launch shape for `arch` and a compiled `head_dim`, and for a kind of kernel (mask, accumulator) that differs."""
    own: tuple[int | str, ...] = (arch, head_dim, *kind)
    if own in tiles:
        return tiles[own]
    row = arch if (arch, head_dim) in tiles else 0
    keys: list[tuple[int | str, ...]] = [(row, head_dim, *kind[:n]) for n in range(len(kind), -1, -1)]
    return next(tiles[key] for key in keys if key in tiles)


def initializer(name: str, fields: Mapping[str, object]) -> str:
    """A C++ struct's value with its fields by name, of which those left out have their defaults."""
    return f"{name}{{{', '.join(f'.{field} = {value}' for field, value in fields.items())}}}"


@dataclass(frozen=True, eq=False)  # a row of the table, equal to itself only
class KernelFamily:
    """The CUDA kernels for one format of quantised K and V: a quantiser, and attention for each head dimension, mask and accumulator.

    Image `attend_NAME_dD` holds the attention kernels of one compiled head dimension. The quantisers of all kernels made for the same
    devices share an image, and those of the same tile the quantiser of K.
    """

    name: str
    source: str  # of the attention kernels, relative to csrc/
    layout: str  # the C++ type of a tile of K and V, {d} being the compiled head dimension
    tile_bytes: Callable[[int], int]  # what that type's kTileBytes is
    schemes: dict[str, Scheme]  # what is computed, by pv_accum_dtype, the default first
    tiles: Tiles  # by (arch, compiled head_dim), with mask and accumulator where they differ; arch 0 is the default
    entry: Callable[[KernelFamily, int, int, str, str], Entry]  # the attention kernel for (arch, head_dim, mask, accumulator)
    arch: int = 0  # compute capability of the only devices it is made for, whose machine code is "sm_XXa"; 0: any from min_arch on
    min_arch: int = 75
    masks: tuple[str, ...] = MASKS  # kinds of kernels that there are; those of lists alone serve block-sparse calls
    # Families of the same name have their quantisers in one image and, for tiles of equal size, K's in common. "": a call's only launch
    # quantises K and V itself, of as many keys as its stages hold.
    quantizers: str = "mma"
    scale_blocks: int = 1  # of a tile's keys: those of each share K's scales
    # V has columns of ones, whose products are the softmax's sums: where K and V of a key are zeros, ones included, it needs no mask.
    v_ones: bool = False
    dtype: str = ""  # of the tensors that it is made for, in rows aligned to 16 bytes; "": any
    # Persistent kernels: bytes of split-KV partials (O, l, m) that a CTA leaves for the CTA with which it shares its last work tile, by
    # compiled head dimension.
    split_kv_bytes: Callable[[int], int] | None = None

    @property
    def persistent(self) -> bool:
        """Whether a grid of any size does all unmasked work."""
        return self.split_kv_bytes is not None

    @property
    def resident(self) -> bool:
        """Whether K and V of a head stay in shared memory."""
        return not self.quantizers

    def most_keys(self, head_dim: int) -> int:
        """Of a resident family: the keys that shared memory has room for."""
        tile = find_tile(self.tiles, 0, head_dim)
        return tile.block_n * tile.stages

    @property
    def head_dims(self) -> tuple[int, ...]:
        return tuple(d for d in HEAD_DIMS if any(key[1] == d for key in self.tiles))

    @property
    def accumulators(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(s.accumulate for s in self.schemes.values()))

    @property
    def pv(self) -> str:
        """The type of P and V."""
        return next(iter(self.schemes.values())).pv

    @property
    def quantizer(self) -> str:
        """The quantisers' image."""
        return f"quantize_{self.quantizers}"

    @property
    def key_kinds(self) -> tuple[str, ...]:
        """Which quantisers it needs, by `KEYS`."""
        return () if self.resident else KEYS if self.masks == MASKS else ("live",)

    def scale_block_keys(self, head_dim: int) -> int:
        """Keys of K that share scales: kScaleKeys of the layout."""
        return find_tile(self.tiles, 0, head_dim).block_n // self.scale_blocks

    def quantize_k_symbol(self, head_dim: int, keys: str = "all") -> str:
        """`keys`: of `KEYS`."""
        return f"quantize_k_{self.quantizers}_{find_tile(self.tiles, 0, head_dim).block_n}_d{head_dim}" + KEYS_SUFFIX[keys]

    def quantize_v_symbol(self, head_dim: int, keys: str = "all") -> str:
        return f"quantize_v_{self.name}_d{head_dim}" + KEYS_SUFFIX[keys]

    def attend_image(self, head_dim: int) -> str:
        return f"attend_{self.name}_d{head_dim}"

    def attend_symbol(self, head_dim: int, mask: str, accumulate: str) -> str:
        return f"attend_{self.name}_d{head_dim}_{mask}_{accumulate}"

    def built_for(self, target: str) -> bool:
        """Whether there are images for this target of the compiler, such as "sm_80"."""
        arch = int(target.split("_")[1].rstrip("a"))
        return target == f"sm_{self.arch}a" if self.arch else arch >= self.min_arch
