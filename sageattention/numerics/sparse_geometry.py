"""Which tokens exist and what a query may see, at the grain of blocks: the part of block-sparse attention that needs no scores."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .pooling import BLOCK, count_blocks


@dataclass(frozen=True)
class Geometry:
    """What is around the scores. Token ranges are half-open and in the order of the tensors.

    Attributes:
        q_block: query rows that share a list, 64 or 128.
        is_causal: query i sees the keys up to position q_start + i (q_start None counts as 0).
        q_start: key position of query 0; None where queries and keys are no common sequence.
        sinks: ranges of keys; their blocks are exact for every query.
        query_sinks: ranges of queries; their blocks compute every block.
        neighbours: KV blocks on either side of the query rows' own that are exact; None for no such rule. It takes q_start.
        order: integer [N], the row of the tensors that stands at each position of the block order; None for the tensors' own order.
        key_mask: bool [B, Nk], True where the key exists.
        block_len: integer [n] or [B, n], keys that exist at the beginning of each block; where queries and keys are one sequence
            (q_start 0, equally many), also the rows that count in the queries' means.
    """

    q_block: int = 128
    is_causal: bool = False
    q_start: int | None = 0
    sinks: Sequence[tuple[int, int]] = ()
    query_sinks: Sequence[tuple[int, int]] = ()
    neighbours: int | None = 1
    order: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    block_len: torch.Tensor | None = None


class BlockView:
    """A `Geometry` laid over `len_q` queries and `len_kv` keys: m blocks of 64 query rows, n KV blocks, lists of `rows` blocks of rows.

    Attributes:
        place: index of the tensors' rows by the position of the block order; a slice of all where that is their own order.
        visible: bool [m, n], whether any row sees any key of the block.
        whole: bool [m, n], whether all rows see all its keys: such a block may be in the tail.
        near: bool [m, n], blocks that are exact for where they lie.
        sinks: bool [n].
        query_sinks: bool [lists, 1].
    """

    def __init__(self, len_q: int, len_kv: int, geometry: Geometry, device: torch.device):
        self.len_q, self.len_kv, self.geometry, self.device = len_q, len_kv, geometry, device
        self.rows = geometry.q_block // BLOCK
        self.m, self.n = count_blocks(len_q), count_blocks(len_kv)
        self.lists = count_blocks(len_q, geometry.q_block)
        self.place: slice | torch.Tensor = slice(None) if geometry.order is None else geometry.order.long()
        self.start = geometry.q_start or 0

    @functools.cached_property
    def _blocks(self) -> torch.Tensor:
        return torch.arange(self.n, device=self.device)

    @functools.cached_property
    def _first(self) -> torch.Tensor:
        """The first query of each block of rows, [m, 1]."""
        return torch.arange(self.m, device=self.device)[:, None] * BLOCK

    @functools.cached_property
    def _last(self) -> torch.Tensor:
        return (self._first + BLOCK - 1).clamp_max(self.len_q - 1)

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        if not self.geometry.is_causal:
            return torch.ones(self.m, self.n, dtype=torch.bool, device=self.device)
        return self._blocks * BLOCK <= self.start + self._last

    @functools.cached_property
    def whole(self) -> torch.Tensor:
        if not self.geometry.is_causal:
            return self.visible
        return (self._blocks * BLOCK + BLOCK - 1).clamp_max(self.len_kv - 1) <= self.start + self._first

    @functools.cached_property
    def near(self) -> torch.Tensor:
        reach = self.geometry.neighbours
        if reach is None or self.geometry.q_start is None:
            return torch.zeros(self.m, self.n, dtype=torch.bool, device=self.device)
        before, after = (self.start + self._first) // BLOCK - reach, (self.start + self._last) // BLOCK + reach
        return (self._blocks >= before) & (self._blocks <= after)

    @functools.cached_property
    def sinks(self) -> torch.Tensor:
        return self._touched(self.geometry.sinks, self.len_kv, BLOCK)

    @functools.cached_property
    def query_sinks(self) -> torch.Tensor:
        return self._touched(self.geometry.query_sinks, self.len_q, self.geometry.q_block)[:, None]

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of x [..., N, D] in block order."""
        return x if isinstance(self.place, slice) else x.index_select(-2, self.place)

    def live_keys(self, b: int) -> torch.Tensor | None:
        """Keys of batch b that exist, bool [Nk] in block order; None for all."""
        g, live = self.geometry, None
        if g.key_mask is not None:
            live = g.key_mask[b][self.place]
        if g.block_len is not None:
            filled = self._filled(g.block_len, b)
            live = filled if live is None else live & filled
        return live

    def live_queries(self, b: int) -> torch.Tensor | None:
        """Rows of batch b that count in the queries' means, bool [Nq] in block order; None for all."""
        length, shared = self.geometry.block_len, self.geometry.q_start == 0 and self.len_q == self.len_kv
        return self._filled(length, b) if shared and length is not None else None

    def seen_keys(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | None:
        """Which of the keys each of the rows sees, by their positions: bool [rows, keys]; None for all."""
        if not self.geometry.is_causal:
            return None
        return keys <= rows[:, None] + (self.geometry.q_start or 0)

    def of_lists(self, of_rows: torch.Tensor) -> torch.Tensor:
        """bool [..., m, n] → [..., lists, n], what is true of any row block of a list."""
        return torch.nn.functional.pad(of_rows, (0, 0, 0, -self.m % self.rows)).unflatten(-2, (-1, self.rows)).any(-2)

    def of_rows(self, of_lists: torch.Tensor) -> torch.Tensor:
        """bool [..., lists, n] → [..., m, n]."""
        return of_lists.repeat_interleave(self.rows, -2)[..., : self.m, :]

    def _touched(self, ranges: Sequence[tuple[int, int]], tokens: int, block: int) -> torch.Tensor:
        """Blocks that hold a token of the ranges."""
        inside = torch.zeros(tokens, dtype=torch.bool, device=self.device)
        for start, stop in ranges:
            inside[start:stop] = True
        return torch.nn.functional.pad(inside[self.place], (0, -tokens % block)).view(-1, block).any(1)

    def _filled(self, length: torch.Tensor, b: int) -> torch.Tensor:
        length = length if length.dim() == 1 else length[b if length.shape[0] > 1 else 0]
        return (torch.arange(BLOCK, device=self.device) < length[:, None]).flatten()[: self.len_kv]
