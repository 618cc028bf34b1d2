"""Row maps and static masks of video grids."""

from __future__ import annotations

import itertools
import math

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported  # noqa: E402
from sageattention.block_order import CUBES, cube_order, inverse_order, radial_block_mask, vsa_tiles  # noqa: E402

GRIDS = [(8, 8, 8), (5, 6, 7), (1, 9, 3), (4, 4, 4), (3, 0, 5), (0, 4, 4)]


@pytest.mark.parametrize("cube", CUBES)
@pytest.mark.parametrize("prefix, suffix", [(0, 0), (10, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_cube_order_is_a_permutation_that_keeps_the_ends(grid, prefix, suffix, cube):
    order = cube_order(*grid, cube, prefix=prefix, suffix=suffix)
    total = prefix + math.prod(grid) + suffix
    assert order.dtype == torch.int32 and sorted(order.tolist()) == list(range(total))
    assert order[:prefix].tolist() == list(range(prefix)) and order[total - suffix :].tolist() == list(range(total - suffix, total))
    assert torch.equal(order[inverse_order(order).long()].long(), torch.arange(total))


@pytest.mark.parametrize("cube", CUBES)
def test_full_cubes_fill_blocks(cube):
    grid = (8, 16, 12)
    order = cube_order(*grid, cube, prefix=64).long()[64:] - 64
    place = torch.stack((order // (16 * 12), order // 12 % 16, order % 12), -1).view(-1, 64, 3)
    extent = place.amax(1) - place.amin(1) + 1
    assert (extent == torch.tensor(cube)).all()


@pytest.mark.parametrize("cube", CUBES)
@pytest.mark.parametrize("grid", [(10, 22, 35), (13, 45, 80), (5, 30, 17), (21, 9, 31)])
def test_blocks_of_ragged_grids_are_small_volumes(grid, cube):
    """Wherever the edges fall, nine of ten blocks lie in a box of at most three times their tokens, and none is spread over the grid."""
    order = cube_order(*grid, cube, prefix=7).long()[7:] - 7
    _, height, width = grid
    place = torch.stack((order // (height * width), order // width % height, order % width), -1)
    blocks = place[: len(place) // 64 * 64].view(-1, 64, 3)
    box = (blocks.amax(1) - blocks.amin(1) + 1).prod(-1)
    assert (box <= 3 * 64).float().mean() > 0.9
    assert box.max() <= 64 * 16


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [(), (10, 70), (64,), (0, 5)])
def test_vsa_tiles_hold_every_token_once(grid, prefix):
    tiles = vsa_tiles(*grid, prefix=prefix)
    total = sum(prefix) + math.prod(grid)
    slots = tiles.rows.view(-1, 64)
    held = (slots >= 0).sum(1)
    assert torch.equal(held.int(), tiles.block_len) and (held > 0).all()
    assert all((row[:n] >= 0).all() for row, n in zip(slots, held.tolist()))  # padding is at the end of a tile
    assert sorted(tiles.rows[tiles.rows >= 0].tolist()) == list(range(total))
    first = tiles.rows[: tiles.prefix_slots]
    assert (first < sum(prefix)).all() and (tiles.rows[tiles.prefix_slots :] != -1).sum() == math.prod(grid)
    borders = torch.tensor([sum(prefix[:i]) for i in range(1, len(prefix))])
    for row in first.view(-1, 64):  # no tile holds tokens of two segments
        inside = row[row >= 0]
        assert not any(int(inside.min()) < int(b) <= int(inside.max()) for b in borders)
    x = torch.arange(2.0 * total).view(2, total)
    assert torch.equal(tiles.unpad(tiles.pad(x, 1), 1), x)
    assert (tiles.pad(x + 1, 1)[:, tiles.rows < 0] == 0).all()


@pytest.mark.parametrize("q_block", (64, 128))
@pytest.mark.parametrize(
    "frames, size, prefix, suffix, decay", [(5, 150, 0, 0, 1.0), (9, 300, 0, 0, 0.3), (6, 333, 77, 20, 0.5), (3, 64, 0, 0, 0.0)]
)
def test_radial_mask_holds_every_pair_that_sees_each_other(frames, size, prefix, suffix, decay, q_block):
    total, end = prefix + frames * size + suffix, prefix + frames * size
    row = torch.arange(total)
    video = (row >= prefix) & (row < end)
    frame, place = (row - prefix) // size, (row - prefix) % size
    distance = (frame[:, None] - frame).abs()
    width = torch.tensor([size] + [max(64.0, size * decay / 2 ** d.bit_length()) for d in range(1, total + 1)])
    keep = ((place[:, None] - place).abs() <= width[distance.clamp_max(total)]) | (frame == 0)[None] & video
    keep |= ~video[:, None] | ~video[None]
    padded = torch.nn.functional.pad(keep, (0, -total % 64, 0, -total % q_block))
    expected = padded.unflatten(1, (-1, 64)).unflatten(0, (-1, q_block)).any(3).any(1)
    assert torch.equal(radial_block_mask(frames, size, prefix=prefix, suffix=suffix, decay=decay, q_block=q_block)[0, 0], expected)


def test_radial_mask_thins_with_distance():
    mask = radial_block_mask(16, 4096, decay=0.5)[0, 0].float().view(16, 32, 16, 64).mean((1, 3))
    far = [float(mask[15, 15 - d]) for d in range(15)]
    assert far[0] == 1 and all(a >= b for a, b in itertools.pairwise(far)) and far[14] < 0.1
    assert (mask[:, 0] == 1).all()


@pytest.mark.parametrize(
    "call, parameter",
    [
        (lambda: cube_order(-1, 2, 3), "frames"),
        (lambda: cube_order(1, 2, 3, (1, 8, 8)), "cube"),
        (lambda: cube_order(1, 2, 3, prefix=-2), "prefix"),
        (lambda: vsa_tiles(1, 2.5, 3), "height"),
        (lambda: radial_block_mask(2, 100, q_block=32), "q_block"),
        (lambda: radial_block_mask(2, 100, decay=-1.0), "decay"),
    ],
)
def test_what_makes_no_sense_is_refused(call, parameter):
    with pytest.raises(Unsupported) as refused:
        call()
    assert refused.value.parameter == parameter
