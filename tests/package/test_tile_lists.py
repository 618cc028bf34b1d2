"""Tile lists as the planner sees them: what of a mask tells batches, heads and queries apart, and what its lists take of the workspace."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.kernels import store  # noqa: E402
from sageattention.numerics.constants import MAX_WORDS  # noqa: E402
from sageattention.planning.plan import CudaPlan, plan  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.planning.tile_lists import ALIGN, tile_list_shape  # noqa: E402
from sageattention.variants import VARIANTS  # noqa: E402

CUDA = [name for name, variant in VARIANTS.items() if variant.backend == "cuda"]
CARD = Capability("cuda", 90, 132, "native", "sm_90")
each_variant = pytest.mark.parametrize("variant", CUDA)


@pytest.fixture(autouse=True)
def all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "missing", lambda image: "")


def problem(tokens: int, heads: int = 24, mask: str = "bool", mask_shape: tuple[int, int, int] = (1, 1, 1), **changes) -> Problem:
    return Problem(1, heads, heads, tokens, tokens, 128, "bfloat16", "cuda", 0, mask=mask, mask_shape=mask_shape, **changes)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    "mask, expected",
    [
        (ones(9), (1, 1, 1)),
        (ones(5, 9), (1, 1, 5)),
        (ones(4, 1, 9), (1, 4, 1)),
        (ones(2, 1, 1, 9), (2, 1, 1)),
        (ones(2, 4, 5, 9), (2, 4, 5)),
        (ones(2, 1, 1, 9).expand(2, 4, 5, 9), (2, 1, 1)),
        (ones(1, 1, 5, 1).expand(2, 4, 5, 9), (1, 1, 5)),
        (torch.zeros(2, 4, 5, 9), (2, 4, 5)),
    ],
)
def test_what_a_mask_tells_apart(mask: torch.Tensor, expected: tuple[int, int, int]) -> None:
    q, kv = torch.zeros(2, 4, 5, 64), torch.zeros(2, 2, 9, 64)
    assert Problem.from_tensors(q, kv, kv, attn_mask=mask).mask_shape == expected
    halves = Problem.from_kv(kv, kv, tensor_layout="HND")
    assert halves.mask_shape == (1, 1, 1) and halves.with_query(q, attn_mask=mask).mask_shape == expected


def test_a_key_mask_wants_a_mask_that_hides_its_keys() -> None:
    q, kv = torch.zeros(2, 4, 5, 64), torch.zeros(2, 2, 9, 64)
    halves = Problem.from_kv(kv, kv, tensor_layout="HND", key_mask=ones(2, 9))
    assert halves.mask == "bool" and halves.mask_shape == (2, 1, 1)
    assert halves.with_query(q, attn_mask=ones(5, 9)).mask_shape == (1, 1, 5)
    with pytest.raises(Unsupported, match=r"^attn_mask: is None, .* key_mask"):
        halves.with_query(q)


@pytest.mark.parametrize(
    "changes, tile, sizes",
    [
        ({}, 64, (1 * 2 * 3, 144, 144, 0)),  # 4,608 keys are 72 tiles, three words; 144 words of keys
        ({"mask": "additive"}, 64, (1 * 2 * 3, 144, 0, 4608)),
        ({"mask": "additive", "len_kv": 4600}, 96, (1 * 2 * 2, 144, 0, 4608)),  # whole tiles
        ({"mask": "additive", "mask_shape": (1, 1, 4608)}, 64, (144 * 2 * 3, 144 * 144, 0, 0)),
        ({}, 128, (1 * 2 * 2, 144, 144, 0)),
        ({"causal": True}, 64, (144 * 2 * 3, 144 * 144, 144, 0)),
        ({"mask_shape": (1, 1, 4608)}, 64, (144 * 2 * 3, 144 * 144, 4608 * 144, 0)),
        ({"mask_shape": (1, 24, 4608)}, 64, (24 * 144 * 2 * 3, 24 * 144 * 144, 24 * 4608 * 144, 0)),
    ],
)
def test_words_of_the_lists_the_live_keys_and_the_mask(changes: dict, tile: int, sizes: tuple[int, int, int, int]) -> None:
    p = problem(4608)._replace(**changes)
    shape = tile_list_shape(p, p.len_kv, tile)
    assert tuple(size // 4 for size in (shape.list_bytes, shape.live_bytes, shape.kept_bytes, shape.bias_bytes)) == sizes
    assert 0 <= shape.size - 4 * sum(sizes) < ALIGN and shape.mask_offset % ALIGN == 0


@each_variant
@pytest.mark.parametrize("mask", ["bool", "additive"])
@pytest.mark.parametrize("rows", [1, 0], ids=["keys", "dense"])
@pytest.mark.parametrize("tokens", [4608, 15360, 24576])
def test_heads_are_grouped_by_what_the_lists_leave(tokens: int, rows: int, mask: str, variant: str) -> None:
    p = problem(tokens, 56, mask, (1, 1, rows or tokens))
    chosen = plan(p, CARD, variant)
    tile = chosen.tile.block_n
    groups = -(-56 // chosen.heads_per_group)
    alive = min(CudaPlan.GROUPS_ALIVE, groups) * chosen.heads_per_group * -(-tokens // tile) * chosen.kernels.tile_bytes(128)
    assert alive + tile_list_shape(p, tokens, tile).size <= CudaPlan.WORKSPACE_LIMIT


@each_variant
def test_a_mask_whose_bits_leave_no_room_is_refused(variant: str) -> None:
    with pytest.raises(Unsupported, match=r"^attn_mask: its lists and bits take 1\d\d MiB .*accepted is a smaller one"):
        plan(problem(32768, mask_shape=(1, 1, 32768)), CARD, variant)
    with pytest.raises(Unsupported, match=r"^attn_mask: its lists"):
        plan(problem(8192, mask_shape=(1, 24, 8192)), CARD, variant)
    for fits in (problem(32768), problem(32768, causal=True), problem(32768, mask="additive", mask_shape=(1, 1, 32768))):
        assert plan(fits, CARD, variant).variant.name == variant


def test_auto_leaves_such_a_mask_to_torch() -> None:
    chosen = plan(problem(32768, mask_shape=(1, 1, 32768)), Capability("cuda", 89, 100, "none", "sm_89"))
    assert chosen.variant.name == "sdpa"
    assert any("attn_mask: its lists" in reason for _, reason in chosen.rejected)


@each_variant
def test_more_keys_than_a_plane_has_bits_are_refused_with_a_mask_alone(variant: str) -> None:
    tile = plan(problem(4096), CARD, variant).tile.block_n
    most = MAX_WORDS * 32 * tile
    for keys, refused in ((most, False), (most + 1, True)):
        p = problem(4096)._replace(len_kv=keys)
        if refused:
            with pytest.raises(Unsupported, match=rf"^attn_mask: goes over {keys:,} keys; .* at most {most:,}"):
                plan(p, CARD, variant)
        else:
            assert plan(p, CARD, variant).variant.name == variant
        assert plan(p._replace(mask="none"), CARD, variant).variant.name == variant
