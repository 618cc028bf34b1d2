"""Tile lists, live keys and masks in bits: by plain PyTorch from a mask, and made up, for kernels to walk whatever a test wants."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from sageattention.backends.cuda import host
from sageattention.backends.cuda.workspace import LaunchPlan
from sageattention.numerics.constants import BAND_ROWS, LOG2E, MASK_LIMIT, NEGLIGIBLE_BIAS
from sageattention.planning.tile_lists import ALIGN

KINDS = ("empty", "single", "all full", "all mixed", "random")


def pack(bits: torch.Tensor) -> torch.Tensor:
    """[…, n] bool to […, ⌈n / 32⌉] int32: bit i % 32 of word i / 32."""
    words = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 32)).unflatten(-1, (-1, 32)).long()
    word = (words << torch.arange(32, device=bits.device)).sum(-1)
    return torch.where(word < 2**31, word, word - 2**32).int()


def by_tiles(bits: torch.Tensor, tile: int, rows: int, fill: float) -> torch.Tensor:
    """[B, H, Nq, Nk] to [B, H, groups of `rows` queries, tiles, rows · tile], beyond the ends `fill`."""
    (len_q, len_kv) = bits.shape[2:]
    padded = torch.nn.functional.pad(bits, (0, -len_kv % tile, 0, -len_q % rows), value=fill)
    return padded.unflatten(2, (-1, rows)).unflatten(4, (-1, tile)).transpose(3, 4).flatten(4)


@dataclass(frozen=True)
class Bits:
    """What `classify_mask` leaves of a mask [B | 1, H | 1, Nq | 1, Nk], per band of queries."""

    seen: torch.Tensor  # [B, H, bands, tiles]
    uneven: torch.Tensor  # the same
    live: torch.Tensor  # [B, H, bands, Nk]
    kept: torch.Tensor | None  # [B, H, Nq | 1, Nk], of a bool mask
    bias: torch.Tensor | None = None  # [B, H, whole tiles of keys], fp32 in base 2, of an additive mask of one row

    def words(self, filler: int = 0) -> torch.Tensor:
        """All of it as it lies in memory, uint8; `filler`: bytes that belong to nothing."""
        lists, live = (x.flatten().view(torch.uint8) for x in (pack(torch.stack((self.seen, self.uneven), 3)), pack(self.live)))
        gap = live.new_full((-(lists.numel() + live.numel()) % ALIGN,), filler)
        mask = [x.flatten().view(torch.uint8) for x in (None if self.kept is None else pack(self.kept), self.bias) if x is not None]
        return torch.cat([lists, live, gap, *mask])


def classify(mask: torch.Tensor, len_q: int, len_kv: int, tile: int, is_causal: bool) -> Bits:
    """By the definition in docs/kernels.md; mask: 4-D, stride 0 where it is the same for all."""
    mask = mask[..., :len_kv].expand(-1, -1, -1, len_kv)
    mask = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride()[:3])]
    one_row = mask.shape[2] == 1
    one_band = one_row and not is_causal
    rows = 1 if one_band else BAND_ROWS
    every = mask.expand(-1, -1, 1 if one_band else len_q, -1)
    reach = torch.ones(every.shape[2], len_kv, dtype=torch.bool)
    reach = reach.tril() if is_causal else reach
    bias = torch.zeros(every.shape).masked_fill(~every, -torch.inf) if mask.dtype == torch.bool else every.float()
    kept = (bias != -torch.inf) & reach
    top = bias.masked_fill(~reach, -torch.inf).amax(-1, keepdim=True)
    if one_row and is_causal:  # the kernel looks at a band's first row alone: its largest bias is no larger than any other's
        top = top[:, :, torch.arange(len_q) // BAND_ROWS * BAND_ROWS]
    alive = kept & ~(bias < top - NEGLIGIBLE_BIAS)
    live = by_tiles(alive, len_kv, rows, False).unflatten(4, (rows, len_kv)).any(4)[:, :, :, 0]
    even = by_tiles(kept & (bias == 0), tile, rows, True).all(-1)
    even[..., -1] &= len_kv % tile == 0
    if mask.dtype == torch.bool:
        kept_mask, row = mask, None
    else:
        base2 = torch.where(mask == -torch.inf, -torch.inf, (mask.float() * LOG2E).clamp(-MASK_LIMIT, MASK_LIMIT))
        kept_mask, row = None, by_tiles(base2, tile, 1, -torch.inf).flatten(2) if one_row else None
    return Bits(by_tiles(kept, tile, rows, False).any(-1), ~even, live, kept_mask, row)


def made_up(kind: str, len_q: int, len_kv: int, heads: int, block_m: int, tile: int, seed: int = 0) -> tuple[Bits, torch.Tensor]:
    """Lists of one of `KINDS` for blocks of `block_m` queries, with bits that keep keys of absent tiles too: only the list leaves them out.

    Returns:
        (bits, the pairs [1, heads, Nq, Nk] that are attended to)
    """
    g = torch.Generator().manual_seed(seed)
    blocks, tiles, block_bands = -(-len_q // block_m), -(-len_kv // tile), block_m // BAND_ROWS
    drawn = torch.rand(1, heads, blocks, tiles, generator=g)
    listed = {"empty": drawn < 0, "single": drawn == drawn.amax(-1, keepdim=True), "random": drawn < 0.4}.get(kind, drawn >= 0)
    if kind == "random":
        listed[:, :, 0] = False  # a block without a tile between others
    bands = -(-len_q // BAND_ROWS)
    listed = listed.repeat_interleave(block_bands, 2)[:, :, :bands]
    # Of a listed tile each band sees all, some or nothing; the end of the keys is nobody's.
    state = torch.randint({"all full": 2, "all mixed": 1}.get(kind, 0), 3 - (kind == "all mixed"), listed.shape, generator=g)
    full = state == 2 if kind != "all full" else torch.ones_like(listed)
    if len_kv % tile:
        full[..., -1] = False
    seen = listed & (state > 0)
    kept = torch.rand(1, heads, len_q, len_kv, generator=g) < 0.5

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(BAND_ROWS, 2)[:, :, :len_q].repeat_interleave(tile, 3)[..., :len_kv]

    kept = spread(~listed) | spread(listed & full) | (kept & spread(seen))
    pairs = kept & spread(seen)
    live = by_tiles(pairs, len_kv, BAND_ROWS, False).unflatten(4, (BAND_ROWS, len_kv)).any(4)[:, :, :, 0]
    return Bits(seen, ~(listed & full), live, kept), pairs


def install(monkeypatch: pytest.MonkeyPatch, bits: Bits) -> None:
    """Halves take `bits` for those of whatever mask they are given, a bool one of the same shape."""

    def given(r: LaunchPlan, mask: torch.Tensor) -> tuple:
        lists = host._lists(r, mask, mask.data_ptr() % 16)
        space = bits.words().to(mask.device)
        assert space.numel() == lists.size
        return lists, space, ()

    monkeypatch.setattr(host, "_classify", given)
