"""The memory that a dense mask's tile lists take: what `classify_mask` writes and the attention kernels read (docs/kernels.md)."""

from __future__ import annotations

from typing import NamedTuple

from ..numerics.constants import BAND_ROWS
from .problem import Problem

WORD_BITS, WORD_BYTES = 32, 4
ALIGN = 16  # of the row of biases, in bytes


class TileListShape(NamedTuple):
    """Sizes of a mask's lists, its live keys, and its bits or biases, in words of 32 bits; 1 where the mask is the same for all."""

    batches: int
    heads: int
    rows: int  # queries
    bands: int  # of BAND_ROWS queries, 1 where neither mask nor causality tell queries apart
    words: int  # of a plane: one bit a KV tile
    live_words: int  # one bit a key
    is_bool: bool
    bias_len: int  # of an additive mask with one row for all queries: keys, whole tiles; 0: it is read where it lies

    @property
    def list_bytes(self) -> int:
        """Two planes for each band."""
        return self.batches * self.heads * self.bands * 2 * self.words * WORD_BYTES

    @property
    def live_bytes(self) -> int:
        """The keys that some query of a band sees."""
        return self.batches * self.heads * self.bands * self.live_words * WORD_BYTES

    @property
    def kept_bytes(self) -> int:
        """A bool mask itself."""
        return self.batches * self.heads * self.rows * self.live_words * WORD_BYTES if self.is_bool else 0

    @property
    def bias_bytes(self) -> int:
        """An additive one of one row, in fp32."""
        return self.batches * self.heads * self.bias_len * WORD_BYTES

    @property
    def mask_offset(self) -> int:
        """Where its bits or biases lie, behind lists and live keys."""
        return -(-(self.list_bytes + self.live_bytes) // ALIGN) * ALIGN

    @property
    def size(self) -> int:
        return self.mask_offset + self.kept_bytes + self.bias_bytes


def tile_list_shape(p: Problem, len_kv: int, tile: int) -> TileListShape:
    """Of a problem with a dense mask, `len_kv` keys of which can be seen, in KV tiles of `tile` keys."""
    batches, heads, rows = p.mask_shape
    bands = 1 if rows == 1 and not p.causal else -(-p.len_q // BAND_ROWS)
    tiles = -(-len_kv // tile)
    bias_len = tiles * tile if p.mask == "additive" and rows == 1 else 0
    return TileListShape(batches, heads, rows, bands, -(-tiles // WORD_BITS), -(-len_kv // WORD_BITS), p.mask == "bool", bias_len)
