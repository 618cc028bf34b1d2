"""By which of its kernels a candidate computes a call, as far as what the call takes depends on it."""

from __future__ import annotations

from ..kernels.family import find_tile
from ..numerics.constants import KV_TILE
from ..variants import VARIANTS, Candidate
from . import datasheet, resident
from .cost import ALIGNED, RESIDENT, TORCH, UNALIGNED, Form, Kind, Way


def way_of(candidate: Candidate, form: Form, arch: int, multiprocessors: int) -> Way:
    """The kernels that a call gets on a card of the family `arch`; 0: of one that has none of its own."""
    head_dim = form.kind[0]
    if candidate == TORCH:
        return Way(_kind_of_torch(form), torch=True)
    variant = VARIANTS[candidate.variant]
    accum = candidate.accum or next(iter(variant.accum), "")
    for kernels in variant.resident_kernels:
        if kernels.arch == arch and accum in kernels.schemes and resident.computes(kernels, form, multiprocessors):
            tile = find_tile(kernels.tiles, arch, head_dim)
            return Way((head_dim, RESIDENT), tile.block_m, tile.block_n)
    tile_keys = KV_TILE
    if variant.backend == "cuda" and (found := variant.choose(arch, False, head_dim, candidate.accum, False)):
        tile_keys = find_tile(found.tiles, arch, head_dim).block_n
    return Way(form.kind, tile=tile_keys, kv_bytes=datasheet.scheme_of(candidate).kv_bytes(head_dim))


def kinds_of(candidate: Candidate, kind: Kind, arch: int) -> tuple[Kind, ...]:
    """The kinds of kernels by which a candidate computes calls of a kind."""
    head_dim, mask = kind
    if candidate == TORCH:
        return ((head_dim, ALIGNED), (head_dim, UNALIGNED)) if mask in ("bool", "additive") else (kind,)
    families = VARIANTS[candidate.variant].resident_kernels if mask == "none" else ()
    has_resident = any(kernels.arch == arch and head_dim in kernels.head_dims for kernels in families)
    return (kind, (head_dim, RESIDENT)) if has_resident else (kind,)


def _kind_of_torch(form: Form) -> Kind:
    """Masks that tell queries apart are one kind: bool ones become additive ones. Odd rows are for another backend than cuDNN's."""
    head_dim, mask = form.kind
    if mask not in ("bool", "additive"):
        return form.kind
    return head_dim, UNALIGNED if form.len_kv % 2 else ALIGNED
