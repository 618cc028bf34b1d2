"""How a sequence is laid out for block-sparse attention: the order of its tokens, what is always exact, and fixed patterns.

It follows from the grid alone, so it is made once per resolution and kept: tensors that stay the same objects are checked once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..sageattention.block_order import CUBES as CUBE_SHAPES
from ..sageattention.block_order import VsaTiles, cube_order, radial_block_mask, vsa_tiles
from .grid import Grid
from .sparse_settings import AUTO, CUBES, Settings

FEW_FRAMES = 16  # below it cubes of two frames had the smaller error, see docs/sparse.md

Ranges = tuple[tuple[int, int], ...]


class Layout(NamedTuple):
    """Arguments of `sageattn_sparse`.

    Attributes:
        name: of the token order, for people.
        order: int32 [N]; None for the tensors' own.
        sinks, query_sinks: token ranges.
        block_mask: bool [1, 1, lists, blocks], of "radial".
        tiles: of "vsa".
    """

    name: str
    order: torch.Tensor | None = None
    sinks: Ranges = ()
    query_sinks: Ranges = ()
    block_mask: torch.Tensor | None = None
    tiles: VsaTiles | None = None


def lay_out(grid: Grid | str, settings: Settings, device: torch.device) -> Layout | str:
    """The layout of a grid, or of a sequence whose grid is not known (a reason); a reason where the method needs to know it."""
    if isinstance(grid, str):
        return f"{settings.method} needs the token grid: {grid}" if settings.method in ("radial", "vsa") else Layout("frame-major")
    sinks = grid.ends if settings.sinks != "off" else ()
    rows = (grid.exact_rows,) if settings.sinks == "exact_kv_and_rows" and grid.exact_rows[0] < grid.exact_rows[1] else ()
    if settings.method == "vsa":
        if grid.suffix or sum(grid.segments) != grid.prefix:
            return "vsa needs the video at the end of the sequence"
        tiles = vsa_tiles(grid.frames, grid.height, grid.width, prefix=grid.segments, device=device)
        both = ((0, tiles.prefix_slots),) if tiles.prefix_slots else ()
        return Layout("VSA tiles", sinks=both, query_sinks=both, tiles=tiles)
    if settings.method == "radial":
        mask = radial_block_mask(
            grid.frames, grid.height * grid.width, prefix=grid.prefix, suffix=grid.suffix, decay=settings.value, device=device
        )  # fmt: skip
        return Layout("frame-major", sinks=sinks, query_sinks=rows, block_mask=mask)
    cube = _cube(grid, settings.order)
    if cube is None:
        return Layout("frame-major", sinks=sinks, query_sinks=rows)
    order = cube_order(grid.frames, grid.height, grid.width, cube, prefix=grid.prefix, suffix=grid.suffix, device=device)
    return Layout("cubes of {}x{}x{}".format(*cube), order, sinks, rows)


def _cube(grid: Grid, order: str) -> tuple[int, int, int] | None:
    if order != AUTO:
        return CUBES.get(order)
    return CUBE_SHAPES[1] if grid.frames < FEW_FRAMES else CUBE_SHAPES[0]
