"""Token orders and static masks for video: a T × H × W grid of tokens, perhaps behind a prefix of text.

Block-sparse attention works on blocks of 64 consecutive tokens. Frame-major order makes each block a strip of one row of a frame; in cubes
of 4×4×4 tokens it is a small volume, whose tokens resemble each other far more. An order is an int32 row map [N]: position p of the block
order is row order[p] of the tensors, and `sageattn_sparse(order=…)` reads and writes through it, so nothing outside of the call changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from .errors import Unsupported

if TYPE_CHECKING:
    import torch

BLOCK = 64  # tokens of a KV block
CUBES = ((4, 4, 4), (2, 8, 4))  # what measured well; 1×8×8 did not


def cube_order(
    frames: int,
    height: int,
    width: int,
    cube: tuple[int, int, int] = (4, 4, 4),
    *,
    prefix: int = 0,
    suffix: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The row map by which blocks of 64 tokens are small volumes of a frame-major grid, whatever its size.

    Frames and rows are cut into slabs of `cube[0]` frames and `cube[1]` rows, or one fewer so that they are even. A slab is walked along
    the columns, each step its cross-section of 16 tokens: any 64 consecutive ones are a volume, wherever a block begins, so nothing is
    padded at ragged edges. The next slab is walked back, so that a block that holds parts of two holds neighbours.

    Args:
        frames, height, width: the grid, in tokens.
        cube: extent of a full block in frames, rows and columns. The last follows from the others.
        prefix, suffix: tokens before and after the grid, which keep their places.

    Returns:
        int32 [prefix + frames · height · width + suffix].

    Raises:
        Unsupported: a length below 0, or a cube whose volume is not 64.
    """
    import torch

    _check_lengths(frames=frames, height=height, width=width, prefix=prefix, suffix=suffix)
    if cube not in CUBES:
        raise Unsupported("cube", f"got {cube!r}, accepted are {', '.join(map(str, CUBES))} (frames, rows, columns)")
    tokens = frames * height * width
    t, y, x = _place(torch.arange(tokens, device=device), height, width)
    slabs_t, slabs_y = -(-frames // cube[0]), -(-height // cube[1])
    slab_t, slab_y = t * slabs_t // max(frames, 1), y * slabs_y // max(height, 1)
    slab_y = torch.where(slab_t % 2 == 1, slabs_y - 1 - slab_y, slab_y)
    slab = slab_t * slabs_y + slab_y
    grid = torch.argsort(slab * width + torch.where(slab % 2 == 1, width - 1 - x, x), stable=True)
    head, end = torch.arange(prefix, device=device), torch.arange(prefix + tokens, prefix + tokens + suffix, device=device)
    return torch.cat((head, grid + prefix, end)).int()


def inverse_order(order: torch.Tensor) -> torch.Tensor:
    """The position of each row: inverse_order(order)[order[p]] = p, int32 [N]."""
    import torch

    inverse = torch.empty_like(order, dtype=torch.int32)
    inverse[order.long()] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return inverse


class VsaTiles(NamedTuple):
    """Tokens in tiles of 64, as checkpoints trained with Video Sparse Attention (arXiv:2505.13389) have them.

    Attributes:
        rows: int64 [64 · tiles], the token in each slot, −1 in padding, which ends a tile.
        slots: int64 [tokens], the slot of each token.
        block_len: int32 [tiles], tokens in each tile: `sageattn_sparse(block_len=…)`.
        prefix_slots: slots of the prefix segments' tiles, which come first: `sinks` and `query_sinks`.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    block_len: torch.Tensor
    prefix_slots: int

    def pad(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """x with its tokens (along `dim`) in their slots, zeros in between."""
        shape = list(x.shape)
        shape[dim] = self.rows.numel()
        return x.new_zeros(shape).index_copy_(dim, self.slots, x)

    def unpad(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse: the tokens of x (along `dim`) in their own order."""
        return x.index_select(dim, self.slots)


def vsa_tiles(frames: int, height: int, width: int, *, prefix: tuple[int, ...] = (), device: torch.device | str = "cpu") -> VsaTiles:
    """Tiles of 4×4×4 tokens of a frame-major grid, ragged ones padded; each segment of the prefix in tiles of its own.

    Args:
        prefix: lengths of the segments (text, references, audio …) before the grid.

    Raises:
        Unsupported: a length below 0.
    """
    import torch

    _check_lengths(frames=frames, height=height, width=width, **{f"prefix[{i}]": n for i, n in enumerate(prefix)})
    tokens = torch.arange(sum(prefix), device=device)
    tiles = [tile for segment in tokens.split(list(prefix)) for tile in segment.split(BLOCK) if tile.numel()]
    prefix_tiles = len(tiles)
    t, y, x = _place(torch.arange(frames * height * width, device=device), height, width)
    cube = (t // 4 * -(-height // 4) + y // 4) * -(-width // 4) + x // 4
    tiles += (torch.argsort(cube, stable=True) + sum(prefix)).split(torch.bincount(cube).tolist())
    tiles = [tile for tile in tiles if tile.numel()]
    rows = torch.full((len(tiles), BLOCK), -1, dtype=torch.long, device=device)
    for slots, tile in zip(rows, tiles):
        slots[: tile.numel()] = tile
    block_len = torch.tensor([tile.numel() for tile in tiles], dtype=torch.int32, device=device)
    filled = (rows.flatten() >= 0).nonzero().flatten()
    slots = torch.empty_like(filled)
    slots[rows.flatten()[filled]] = filled
    return VsaTiles(rows.flatten(), slots, block_len, BLOCK * prefix_tiles)


def radial_block_mask(
    frames: int,
    tokens_per_frame: int,
    *,
    prefix: int = 0,
    suffix: int = 0,
    decay: float = 1.0,
    q_block: int = 128,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Radial attention's static mask (arXiv:2506.19852) for frame-major tokens: `sageattn_sparse(selection="static", block_mask=…)`.

    A query at place x of its frame sees the keys of a frame d frames away whose place is within w of x: all of them at d = 0, and
    w = tokens_per_frame / 2^g · decay, at least 64, where g is the bit length of d. Frame 0 is seen by all queries; prefix and suffix
    tokens see all and are seen by all. A block is computed if any of its queries sees any of its keys.

    Args:
        prefix, suffix: tokens before and after the video.
        decay: scales the width; smaller is faster.
        q_block: query rows of a block, 64 or 128.

    Returns:
        bool [1, 1, ⌈N / q_block⌉, ⌈N / 64⌉] for N = prefix + frames · tokens_per_frame + suffix.

    Raises:
        Unsupported: a length or decay below 0, or a `q_block` that is neither 64 nor 128.
    """
    import torch

    _check_lengths(frames=frames, tokens_per_frame=tokens_per_frame, prefix=prefix, suffix=suffix)
    if q_block not in (64, 128):
        raise Unsupported("q_block", f"got {q_block!r}, accepted are 64 and 128")
    if not 0 <= decay < float("inf"):
        raise Unsupported("decay", f"got {decay!r}, accepted is a finite number >= 0")
    video_end = prefix + frames * tokens_per_frame
    total = video_end + suffix
    q_blocks, kv_blocks = -(-total // q_block), -(-total // BLOCK)
    mask = torch.zeros(q_blocks, kv_blocks, dtype=torch.bool, device=device)
    outside = torch.ones(total, dtype=torch.bool, device=device)
    outside[prefix:video_end] = False
    mask |= _any_in_blocks(outside, q_block)[:, None] | _any_in_blocks(outside, BLOCK)
    if frames and tokens_per_frame:
        first = outside.clone()
        first[prefix : prefix + tokens_per_frame] = True
        mask |= _any_in_blocks(first, BLOCK)
        mask |= _radial_bands(frames, tokens_per_frame, prefix, decay, q_block, q_blocks, kv_blocks, device)
    return mask[None, None]


def _radial_bands(
    frames: int, size: int, prefix: int, decay: float, q_block: int, q_blocks: int, kv_blocks: int, device: torch.device | str
) -> torch.Tensor:
    """bool [q_blocks, kv_blocks]: for the queries that a block has in one frame, the keys they see in another are one range."""
    import torch

    # Each piece is a query block's part of one frame: queries [low, high] of frame `a`, places within the frame.
    rows = torch.arange(frames * size, device=device)
    block, frame, place = (rows + prefix) // q_block, rows // size, rows % size
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (block[1:] != block[:-1]) | (frame[1:] != frame[:-1])
    ends = torch.ones_like(begins)
    ends[:-1] = begins[1:]
    low, high, block, frame = place[begins], place[ends], block[begins], frame[begins]
    widths = torch.tensor([size, *(int(max(BLOCK, size * decay / 2 ** d.bit_length())) for d in range(1, frames))], device=device)
    edges = torch.zeros(q_blocks, kv_blocks + 1, dtype=torch.int32, device=device)
    for b in range(frames):
        width = widths[(frame - b).abs()]
        start = prefix + b * size + (low - width).clamp_min(0)
        stop = prefix + b * size + (high + width).clamp_max(size - 1)
        one = torch.ones_like(block, dtype=torch.int32)
        edges.index_put_((block, start // BLOCK), one, accumulate=True)
        edges.index_put_((block, stop // BLOCK + 1), -one, accumulate=True)
    return edges.cumsum(1)[:, :-1] > 0


def _place(row: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(frame, row, column) of each token of a frame-major grid."""
    return row // max(height * width, 1), row // max(width, 1) % max(height, 1), row % max(width, 1)


def _any_in_blocks(tokens: torch.Tensor, block: int) -> torch.Tensor:
    import torch

    return torch.nn.functional.pad(tokens, (0, -tokens.numel() % block)).view(-1, block).any(1)


def _check_lengths(**lengths: int) -> None:
    for name, given in lengths.items():
        if not isinstance(given, int) or given < 0:
            raise Unsupported(name, f"got {given!r}, accepted is a number of tokens or frames >= 0")
