"""Packed sequences on the device code without a GPU (tests/emulated_card.py): work lists, and each sequence against the exact result."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_card import CARDS, Lanes, each_variant, install, lanes_of, needs_compiler
from lane_compiler import compiled
from packed_calls import check_sequences, inputs, offsets

from sageattention.backends.cuda import packed as backend
from sageattention.kernels.params import PlaceSequencesParams
from sageattention.planning.packed import PackedProblem
from sageattention.planning.plan import CudaPlan, plan
from sageattention.planning.problem import Problem
from sageattention.variants import VARIANTS

pytestmark = needs_compiler


HOPPER = [(90, head_dim, True) for head_dim in (64, 128, 256)]  # its own kernels


@pytest.fixture(scope="module", params=[*CARDS, *HOPPER], ids=lambda p: f"sm{p[0]}-d{p[1]}{'-wgmma' * (len(p) > 2)}")
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    arch, head_dim, *wgmma = request.param
    return lanes_of(arch, head_dim, tmp_path_factory.mktemp("lanes"), *wgmma)


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


def planned(
    card: Lanes, t: dict[str, torch.Tensor], cu_q: torch.Tensor, cu_k: torch.Tensor, longest: tuple[int, int], variant: str, **options
) -> tuple[PackedProblem, CudaPlan]:  # fmt: skip
    problem = Problem.from_packed(
        **t, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=longest[0], max_seqlen_k=longest[1], return_lse=True, **options
    )._replace(device="cuda", device_index=0)
    wgmma = any(symbol.startswith("attend_wgmma") for symbol in card.entries)
    if card.capability.arch < VARIANTS[variant].min_arch or (wgmma and not any(k.arch for k in VARIANTS[variant].kernels)):
        pytest.skip(f"{variant} has no such kernels")
    chosen = plan(problem, card.capability, variant, arch=0 if wgmma else card.capability.arch)
    assert isinstance(chosen, CudaPlan) and bool(chosen.kernels.arch) == wgmma
    return PackedProblem(problem, len(t["q"]), len(t["k"])), chosen


def run(card: Lanes, t: dict[str, torch.Tensor], cu_q: torch.Tensor, cu_k: torch.Tensor, *how, **options) -> tuple:
    problem, chosen = planned(card, t, cu_q, cu_k, *how, **options)
    backend.packed_plan.cache_clear()
    return *backend.run(**t, cu_seqlens=(cu_q, cu_k), packed=problem, plan=chosen, known={}), chosen.scheme


@each_variant
@pytest.mark.parametrize(
    "lengths_q, lengths_k, causal, dtype, heads",
    [
        ([70, 0, 5, 129], [70, 33, 0, 200], False, "bfloat16", (2, 1)),
        ([65, 1, 0, 130], [65, 1, 0, 130], True, "float16", (4, 2)),
        ([0, 0, 3], [0, 0, 260], False, "float32", (1, 1)),
    ],
    ids=["cross", "causal", "late"],
)
def test_each_sequence_is_a_call_of_its_own(
    card: Lanes, lengths_q: list, lengths_k: list, causal: bool, dtype: str, heads: tuple, variant: str
) -> None:
    t = inputs(card.head_dim - 24, dtype, heads, lengths_q, lengths_k)  # padded inside the kernels
    cu = offsets(lengths_q), offsets(lengths_k, torch.int64)
    out, lse, scheme = run(card, t, *cu, (max(lengths_q), max(lengths_k)), variant, is_causal=causal)
    check_sequences(t, out, lse, scheme, lengths_q, lengths_k, causal, dtype)


@each_variant
def test_groups_give_the_same_bits(card: Lanes, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Of heads, and of sequences."""
    lengths = [70, 0, 33, 65]
    t = inputs(card.head_dim, "bfloat16", (2, 2), lengths, lengths)
    given = card, t, offsets(lengths), offsets(lengths), (70, 70), variant
    whole, whole_lse, _ = run(*given, is_causal=True)
    kernels = planned(*given, is_causal=True)[1].kernels
    seen = set()
    for limit in (20, 10, 4, 2):  # tiles
        monkeypatch.setattr(CudaPlan, "WORKSPACE_LIMIT", limit * kernels.tile_bytes(card.head_dim))
        out, lse, _ = run(*given, is_causal=True)
        assert torch.equal(out, whole) and torch.equal(lse, whole_lse)
        seen.add(backend.packed_plan(*planned(*given, is_causal=True)).shape[:2])
    assert len(seen) >= 3


# --- work lists

PLACE = """
extern "C" void place(const PlaceSequencesParams* p, unsigned groups) { run_grid(groups, kPlaceThreads, [&] { place_group(*p); }); }
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(90, tmp_path_factory.mktemp("place"), ("kernel/place_sequences.cuh",), PLACE)


def placed(library: ctypes.CDLL, cu_q: torch.Tensor, cu_k: torch.Tensor, per_group: int, **numbers: int) -> list[tuple]:
    """By group: (sequences [n, 8], the sequence of each block of queries, of each run of keys)."""
    batch = len(cu_q) - 1
    groups = -(-batch // per_group)
    sequences = torch.full((batch, 8), -1, dtype=torch.int32)
    lists = [torch.full((groups, numbers[name]), -1, dtype=torch.int32) for name in ("max_q_blocks", "max_runs")]
    counts = torch.full((groups, 2), -1, dtype=torch.int32)
    pointers = (tensor.data_ptr() for tensor in (cu_q, cu_k, sequences, *lists, counts))
    wide = (cu.dtype == torch.int64 for cu in (cu_q, cu_k))
    params = PlaceSequencesParams(*pointers, batch, per_group, *wide, **numbers)
    library.place(ctypes.byref(params), groups)
    return [
        (sequences[g * per_group : (g + 1) * per_group], lists[0][g, : counts[g, 0]], lists[1][g, : counts[g, 1]]) for g in range(groups)
    ]


NUMBERS = {"block_m": 128, "tile": 64, "run_keys": 256}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("batch, per_group", [(1, 1), (7, 7), (300, 300), (600, 256), (1000, 300)])
def test_work_lists(place: ctypes.CDLL, batch: int, per_group: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(batch)
    lengths = torch.randint(0, 900, (2, batch), generator=g) * torch.randint(0, 3, (2, batch), generator=g).clamp(max=1)
    cu_q, cu_k = (offsets(row.tolist(), dtype) for row in lengths)
    bounds = {"total_q": int(cu_q[-1]), "total_k": int(cu_k[-1]), "max_len_q": 900, "max_len_k": 900}
    most = dict.fromkeys(("max_q_blocks", "max_kv_tiles", "max_runs"), 20 * per_group)
    for group, (sequences, q_blocks, runs) in enumerate(placed(place, cu_q, cu_k, per_group, **NUMBERS, **bounds, **most)):
        own = slice(group * per_group, group * per_group + len(sequences))
        len_q, len_k = lengths[0, own], lengths[1, own] * (lengths[0, own] > 0)  # nobody sees the keys of no queries
        blocks, tiles, pieces = -(-len_q // 128), -(-len_k // 64), -(-len_k // 256)
        expected = [cu_q[:-1][own], len_q, cu_k[:-1][own], len_k, *(n.cumsum(0) - n for n in (blocks, tiles, pieces))]
        assert torch.equal(sequences[:, :7].long(), torch.stack(expected, 1).long())
        numbers = torch.arange(len(sequences))
        assert torch.equal(sequences[:, 7].long(), numbers)
        assert torch.equal(q_blocks.long(), numbers.repeat_interleave(blocks)) and torch.equal(
            runs.long(), numbers.repeat_interleave(pieces)
        )


WRONG = [
    [0, 300, 100, 512],
    [-5, 200, 512],
    [0, 512, 2**31 - 1],
    [5, 7],
    [512, 0, 512, 0, 512],
    [0, 512, 0, 512, 0, 512],
    [2**31 - 1, -(2**31), 9],
]


@pytest.mark.parametrize("per_group", [2, 9])
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_offsets_reach_nothing_outside(place: ctypes.CDLL, wrong: list[int], per_group: int) -> None:
    """All that the other launches read and write follows from what is asserted here."""
    cu, batch = torch.tensor(wrong), len(wrong) - 1
    most = {"max_q_blocks": 4 + batch, "max_kv_tiles": 8 + batch, "max_runs": 2 + batch}
    bounds = {"total_q": 512, "total_k": 512, "max_len_q": 400, "max_len_k": 400}
    for sequences, q_blocks, runs in placed(place, cu, cu, per_group, **NUMBERS, **bounds, **most):
        q_start, q_len, k_start, k_len, q_block, kv_tile, run, _ = sequences.unbind(1)
        for start, length in ((q_start, q_len), (k_start, k_len)):
            assert (start >= 0).all() and (length >= 0).all() and (length <= 400).all() and (start + length <= 512).all()
        for first, length, size, limit in (
            (q_block, q_len, 128, len(q_blocks)), (kv_tile, k_len, 64, most["max_kv_tiles"]), (run, k_len, 256, len(runs)),
        ):  # fmt: skip
            assert (first + -(-length // size) <= limit)[length > 0].all()
        for of, first, length, size in ((q_blocks, q_block, q_len, 128), (runs, run, k_len, 256)):
            assert ((of >= 0) & (of < len(sequences))).all()
            place_in = torch.arange(len(of)) - first[of.long()]
            assert ((place_in >= 0) & (place_in * size < length[of.long()])).all()
