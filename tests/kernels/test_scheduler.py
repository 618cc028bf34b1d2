"""The tile scheduler of Hopper's kernels on the host: over all CTAs, every KV tile of every work tile exactly once, no more than two CTAs a
work tile, and nobody waits for a CTA that starts later.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from emulated_card import install, needs_compiler, on_card
from lane_compiler import compiled

from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host
from sageattention.device.capability import Capability
from sageattention.kernels.params import AttendParams
from sageattention.numerics.constants import BAND_ROWS, KV_TILE_SM90
from sageattention.planning.plan import plan
from sageattention.variants import CUDA_FP8_SM90, CUDA_FP16

pytestmark = needs_compiler
VARIANTS = {"fp16": CUDA_FP16, "fp8": CUDA_FP8_SM90}
CONFIGS = {"fp16": "WgmmaConfig<CoreMatrix<64, 2, {tile}, true>, {own}>", "fp8": "WgmmaFp8Config<CoreMatrix<64, 1, {tile}, true>, {own}>"}
BLOCK_M, MOST = 128, 1 << 16
WORK_TILE_COST, MIXED_COST = 3, 2  # kWorkTileCost, kMixedCost
WRITES, JOINS = 2, 4  # WorkFlag
FUNCTION = """
extern "C" int schedule_{pv}_{mask}(const AttendParams* p, unsigned blocks, i32* out) {{
  int count = 0;
  run_grid(blocks, 32, [&] {{
    const u32 to = shared_address(dynamic_shared);
    Scheduler<{config}> scheduler;
    while (scheduler.next(*p, to)) {{
      __syncwarp();
      if (threadIdx.x == 0) {{
        const u32 words[] = {{(u32)blockIdx.x, load_shared(to), load_shared(to + 4), load_shared(to + 8), load_shared(to + work::kBh),
                             load_shared(to + work::kBh + 8), load_shared(to + work::kRow0), load_shared(to + work::kFirst),
                             load_shared(to + work::kPartial)}};
        memcpy(out + 9 * count++, words, sizeof words);
      }}
      __syncwarp();
    }}
  }});
  return count;
}}
"""


class Work(NamedTuple):
    """What the scheduler gave to a CTA."""

    cta: int
    masked: int
    unmasked: int
    flags: int
    bh: int
    head: int
    row0: int
    first: int  # the KV tiles are first, first − 1, …
    partial: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    functions = "".join(
        FUNCTION.format(
            pv=pv, mask=mask,
            config=config.format(tile=KV_TILE_SM90[pv], own=f"WgmmaTile{{.mask = Mask::{mask}, .stages = 4, .q_stages = 1}}"),
        )
        for pv, config in CONFIGS.items()
        for mask in ("none", "causal", "list")
    )  # fmt: skip
    return compiled(90, tmp_path_factory.mktemp("scheduler"), ("kernel/mainloop_sm90_fp16.cuh", "kernel/mainloop_sm90_fp8.cuh"), functions)


class Card:
    """Takes launches and runs none: `params` and `blocks` of each attention launch."""

    def __init__(self, multiprocessors: int):
        self.capability = Capability("cuda", 90, multiprocessors, "none", "host")
        self.attention: list[tuple[bytes, int]] = []

    def launch(self, device: int, stream: int, launches: tuple) -> None:
        symbol, blocks, _, _, params, _ = launches[-1]
        if symbol.startswith("attend"):
            self.attention.append((params, blocks))


def schedule(
    library: ctypes.CDLL, card: Card, pv: str, mask: str, heads: tuple[int, int], len_q: int, len_kv: int,
    planes: torch.Tensor | None = None,
) -> Iterator[list[Work]]:  # fmt: skip
    """What each attention launch of the call, one for a group of heads, gives to its CTAs, in the order of the CTAs. planes: of the lists,
    [bands, 2, words], the same for all heads."""
    q, k = (torch.empty(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, h, n, 64) for h, n in zip(heads, (len_q, len_kv)))
    attn_mask = torch.ones(1, 1, len_q, len_kv, dtype=torch.bool) if mask == "list" else None
    problem = on_card({"q": q, "k": k, "v": k, "attn_mask": attn_mask}, is_causal=mask == "causal")
    chosen = plan(problem, card.capability, VARIANTS[pv].name)
    halves = getattr(chosen, "halves", None) or chosen  # not what quantises K and V itself
    host.run(PreparedCall(q, k, k, attn_mask, problem, halves, {}))
    for packed, blocks in card.attention:
        params, counter, out = AttendParams.from_buffer_copy(packed), ctypes.c_int(0), (ctypes.c_int32 * (9 * MOST))()
        if planes is not None:
            assert params.lists.words == planes.shape[-1] and params.lists.band_rows == BAND_ROWS
            params.lists.bits = planes.data_ptr()
        if params.next_work_idx:
            params.next_work_idx = ctypes.addressof(counter)
        count = getattr(library, f"schedule_{pv}_{mask}")(ctypes.byref(params), blocks, out)
        yield [Work(*out[9 * i : 9 * i + 9]) for i in range(count)]


def forms() -> Iterator[tuple[int, tuple[int, int], int, int]]:
    """(multiprocessors, (query heads, kv heads), queries, keys): few and many work tiles for each CTA, waves that are full and not."""
    draw = random.Random(0)
    for number in range(240):
        heads_kv, group = draw.choice((1, 2, 3, 8)), draw.choice((1, 1, 4))
        yield (
            (1, 2, 3, 7, 16, 132)[number % 6],
            (heads_kv * group, heads_kv),
            draw.randint(1, 1500),
            draw.choice((1, 77, 512, draw.randint(1, 2500))),
        )


@pytest.mark.parametrize("mask", ["none", "causal"])
@pytest.mark.parametrize("pv", VARIANTS)
def test_every_kv_tile_once(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, pv: str, mask: str) -> None:
    tile, split = KV_TILE_SM90[pv], 0
    for form in forms():
        multiprocessors, heads, len_q, len_kv = form
        card = install(monkeypatch, Card(multiprocessors))
        keys = min(len_kv, len_q) if mask == "causal" else len_kv  # that any query reaches
        parts: dict[tuple[int, int], list[Work]] = defaultdict(list)
        for work in schedule(library, card, pv, mask, heads, len_q, len_kv):
            for one in work:
                parts[one.head, one.row0].append(one)
            if mask == "causal":  # longest first, over all heads
                lengths = [one.masked + one.unmasked for one in work if one.cta == 0]
                assert lengths == sorted(lengths, reverse=True), form
        assert parts.keys() == {(head, row0) for head in range(heads[0]) for row0 in range(0, len_q, BLOCK_M)}, form
        for (head, row0), own in parts.items():
            reached = min(keys, row0 + BLOCK_M) if mask == "causal" else keys
            taken = sorted(one.first - i for one in own for i in range(one.masked + one.unmasked))
            assert taken == list(range(-(-reached // tile))), (form, head, row0)
            seen_by_all = min(keys, row0 + 1) if mask == "causal" else keys
            whole = -(-keys // tile) if seen_by_all == keys else seen_by_all // tile  # keys beyond the end need no mask: they are zeros
            for one in own:
                assert not one.unmasked or one.first - one.masked < whole, (form, one)
                assert one.bh == head // (heads[0] // heads[1]), (form, one)
                if pv == "fp8":
                    assert one.unmasked != 1, (form, one)
            if len(own) == 1:
                assert own[0].flags == 1, (form, own)
            else:
                joins, writes = sorted(own, key=lambda one: -one.flags)
                assert (joins.flags, writes.flags) == (1 | JOINS, 1 | WRITES) and joins.partial == writes.partial, (form, own)
                assert joins.first >= writes.first and joins.cta > writes.cta, (form, own)  # who waits, waits for one that began before it
                split += 1
    assert (split > 100) == (mask == "none"), split


@pytest.mark.parametrize(("heads", "tokens", "most"), [(24, 1536, 37), (24, 4347, 233)])
def test_shares_take_equally_long(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, heads: int, tokens: int, most: int) -> None:
    """By KV tiles, and what a work tile takes beside them: where every CTA had as many KV tiles, some had a part of a work tile more."""
    card, cost = install(monkeypatch, Card(132)), defaultdict(int)
    for work in schedule(library, card, "fp8", "none", (heads, heads), tokens, tokens):
        for one in work:
            cost[one.cta] += one.masked + one.unmasked + WORK_TILE_COST
    assert len(cost) == 132 and max(cost.values()) <= most, max(cost.values())


def draw_planes(draw: random.Random, len_q: int, len_kv: int, tile: int) -> torch.Tensor:
    """Lists whose lengths differ: [bands, 2, words] int32."""
    tiles, bands = -(-len_kv // tile), -(-len_q // BAND_ROWS)
    planes = torch.zeros(bands, 2, -(-tiles // 32), dtype=torch.int64)
    for band in range(bands):
        seen = {t for t in range(draw.randint(0, tiles)) if draw.random() < 0.9}
        for plane, chosen in ((0, seen), (1, {t for t in seen if draw.random() < 0.2})):
            for t in chosen:
                planes[band, plane, t // 32] |= 1 << t % 32
    return (planes - (planes >> 31 << 32)).to(torch.int32)


def bits_of(planes: torch.Tensor) -> tuple[set[int], set[int]]:
    """The numbers of the tiles that any of the bands has in either plane."""
    words = planes.to(torch.int64) & 0xFFFFFFFF
    bits = (words[..., None] >> torch.arange(32) & 1).any(0).flatten(1)
    seen, uneven = (set(plane.nonzero().flatten().tolist()) for plane in bits)
    return seen, uneven


@pytest.mark.parametrize("pv", VARIANTS)
def test_lists_are_shared_out_by_their_cost(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, pv: str) -> None:
    tile, draw, weighed, split = KV_TILE_SM90[pv], random.Random(1), 0, 0
    for multiprocessors, heads, len_q, len_kv in forms():
        if len_q <= BAND_ROWS:
            continue  # one band for all
        planes = draw_planes(draw, len_q, len_kv, tile)
        lengths = {}  # of each block of queries: tiles, mixed ones
        for row0 in range(0, len_q, BLOCK_M):
            seen, uneven = bits_of(planes[row0 // BAND_ROWS : (row0 + BLOCK_M) // BAND_ROWS])
            lengths[row0] = len(seen), len(seen & uneven)
        card = install(monkeypatch, Card(multiprocessors))
        (work,) = schedule(library, card, pv, "list", heads, len_q, len_kv, planes)
        parts: dict[tuple[int, int], list[Work]] = defaultdict(list)
        for one in work:
            parts[one.head, one.row0].append(one)
        assert parts.keys() == {(head, row0) for head in range(heads[0]) for row0 in lengths}
        for (_, row0), own in parts.items():
            tiles, mixed = lengths[row0]
            taken = sorted(one.first + i for one in own for i in range(one.masked + one.unmasked))
            assert taken == list(range(tiles))
            for one in own:
                assert not one.unmasked or one.first + one.masked >= mixed
            assert len(own) <= 2
            if len(own) == 2:
                joins, writes = sorted(own, key=lambda one: -one.flags)
                assert (joins.flags, writes.flags) == (1 | JOINS, 1 | WRITES) and joins.partial == writes.partial
                assert joins.first <= writes.first and joins.cta > writes.cta
                split += 1
        params = AttendParams.from_buffer_copy(card.attention[0][0])
        blocks = card.attention[0][1]
        costs = {row0: tiles + MIXED_COST * mixed + WORK_TILE_COST for row0, (tiles, mixed) in lengths.items()}
        cost = heads[0] * sum(costs.values())
        if params.full_waves < 0 and cost // blocks >= max(costs.values()):
            own_cost: dict[int, float] = defaultdict(float)
            for one in work:
                tiles = lengths[one.row0][0]
                own_cost[one.cta] += (one.masked + one.unmasked) / tiles * costs[one.row0] if tiles else WORK_TILE_COST
            most = cost / blocks + 2 * (1 + MIXED_COST + WORK_TILE_COST)
            assert max(own_cost.values()) <= most, (multiprocessors, heads, len_q, len_kv)
            weighed += 1
    assert weighed > 30 and split > 100, (weighed, split)
