"""Inputs with the structure of a video model's attention: made up, not taken from a model.

A T × H × W grid of tokens stands behind a prefix (text, references). Within a head, Q and K are one smooth random field over the grid
(a few waves a channel) plus noise, turned by a 3-D rotary embedding, so that tokens attend to what is near them in space or time.
Heads differ in reach, and each is scaled until a given share of its blocks of 64 keys, 8 to 30 % of the video's, holds 90 % of the
weight together with the prefix. The prefix gets a fifth of the weight, as in reports of video models; one head of eight has a sink.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from .workloads import Shape

WAVES = 32  # of a field
NOISE = 0.4  # standard deviation of what differs from token to token, in Q, K and V, the field's being 1
MASS = 0.9
PREFIX_WEIGHT = 0.2
WIDEST = 4.0  # standard deviation of a row's scores, in nats, at most
SAMPLE = 64  # queries by which a head is scaled
BLOCK = 64


class Grid(NamedTuple):
    """Tokens of a video: `prefix` ones, then frames · height · width in frame-major order."""

    prefix: int
    frames: int
    height: int
    width: int


def grid_of(tokens: int) -> Grid:
    """A grid for a number of tokens: frames of about 8:5, half as many frames as the cube root, the rest (at least 1/16, or 128) prefix."""
    frames = max(1, round(tokens ** (1 / 3) / 2))
    area = max(1, (tokens - min(128, tokens // 16)) // frames)
    width = max(1, math.isqrt(area * 8 // 5))
    height = area // width
    return Grid(tokens - frames * height * width, frames, height, width)


@dataclass(frozen=True)
class Head:
    """How far a head reaches.

    Attributes:
        waves: standard deviation of the field's frequency along frames, rows and columns, in periods over the axis. High: near ones only.
        blocks: share of the video's blocks that hold, together with the prefix, `MASS` of the weight.
        sink: share of the weight that the first token takes.
    """

    waves: tuple[float, float, float]
    blocks: float
    sink: float = 0.0


HEADS = (
    Head((1.2, 1.2, 1.2), 0.08),  # a neighbourhood in space and time
    Head((0.2, 2.0, 2.0), 0.12),  # the same place through time
    Head((2.0, 0.7, 0.7), 0.15),  # a region of some frames
    Head((0.5, 0.5, 0.5), 0.30),  # nearly everywhere
    Head((2.5, 0.2, 0.2), 0.20),  # whole frames
    Head((0.7, 2.0, 0.3), 0.15),  # rows
    Head((0.8, 0.8, 0.8), 0.10, sink=0.3),
    Head((0.5, 1.0, 1.0), 0.25),
)


def build(randn: Callable[..., torch.Tensor], shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, H, N, D] in fp32 for `len_kv` tokens; with fewer queries than keys, evenly spaced ones."""
    import torch

    grid = grid_of(shape.len_kv)
    parts: tuple[list, list, list] = ([], [], [])
    for index in range(shape.batch * shape.heads):
        for part, x in zip(parts, _head(randn, grid, shape, HEADS[index % shape.heads % len(HEADS)])):
            part.append(x)
    return tuple(torch.stack(part).unflatten(0, (shape.batch, shape.heads)) for part in parts)


def _head(randn: Callable[..., torch.Tensor], grid: Grid, shape: Shape, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    tokens, dim = shape.len_kv, shape.head_dim
    place = _places(grid, randn(1).device)
    periods = place / torch.tensor(grid[1:], device=place.device).clamp_min(1)
    phase = 2 * math.pi * (periods @ (randn(3, WAVES) * torch.tensor(head.waves, device=place.device)[:, None]) + randn(WAVES))
    mix = randn(WAVES, dim) * (2 / WAVES) ** 0.5
    q = k = torch.cat((randn(grid.prefix, dim), phase.cos() @ mix))
    q, k = (_rotary(x + NOISE * randn(tokens, dim), torch.cat((place.new_zeros(grid.prefix, 3), place))) for x in (q, k))
    slow = (2 * math.pi * (periods @ randn(3, WAVES) + randn(WAVES))).cos() @ randn(WAVES, dim) * (2 / WAVES) ** 0.5
    v = torch.cat((randn(grid.prefix, dim), slow)) + NOISE * randn(tokens, dim) + 0.5 * randn(dim)

    # One channel that hardly turns carries a constant of Q: what K holds there is added to every score of the key.
    q[:, -1], k[:, -1] = 0, 0
    rows = torch.linspace(grid.prefix, tokens - 1, SAMPLE, dtype=torch.float32, device=q.device).long()
    scores = q[rows] @ k.T * dim**-0.5
    gain = _gain(scores[:, grid.prefix :], head)
    q, k = q * gain**0.5, k * gain**0.5
    bias = _bias(scores * gain, grid.prefix, head.sink)
    q[:, -1], k[:, -1] = 4.0, bias * (dim**0.5 / 4)
    if shape.len_q < tokens:
        q = q[torch.linspace(0, tokens - 1, shape.len_q, dtype=torch.float32, device=q.device).long()]
    return q[: shape.len_q], k, v


def _places(grid: Grid, device: torch.device) -> torch.Tensor:
    """(frame, row, column) of each token of the video, fp32 [T · H · W, 3]."""
    import torch

    axes = (torch.arange(n, device=device, dtype=torch.float32) for n in grid[1:])
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


def _rotary(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """x [N, D] with channel pairs turned by the place on one of three axes, at frequencies from 1 down to 1/10,000."""
    import torch

    pairs = x.shape[1] // 2
    split = [pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8]
    angle = torch.cat(
        [place[:, axis, None] * 10000.0 ** (-torch.arange(n, device=x.device) / max(n, 1)) for axis, n in enumerate(split)], 1
    )  # fmt: skip
    even, odd = x[:, 0 : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2]
    turned = x.clone()
    turned[:, 0 : 2 * pairs : 2] = even * angle.cos() - odd * angle.sin()
    turned[:, 1 : 2 * pairs : 2] = even * angle.sin() + odd * angle.cos()
    return turned


def _gain(scores: torch.Tensor, head: Head) -> float:
    """What to multiply the scores [rows, keys of the video] by for the head's share of the blocks to hold what it shall."""
    import torch

    ahead = PREFIX_WEIGHT + head.sink  # lies in the prefix

    def share(gain: float) -> float:
        weight = torch.softmax(scores * gain, -1)
        mass = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(2)
        held = mass.sort(-1, descending=True).values.cumsum(-1)
        return float(((held < (MASS - ahead) / (1 - ahead)).sum(-1) + 1).float().mean()) / mass.shape[1]

    high = WIDEST / float(scores.std(-1).mean().clamp_min(1e-6))  # a grid of a few blocks has no such gain
    low = high / 1000
    for _ in range(20):  # the share falls as the gain rises
        middle = (low * high) ** 0.5
        low, high = (middle, high) if share(middle) > head.blocks else (low, middle)
    return high


def _bias(scores: torch.Tensor, prefix: int, sink: float) -> torch.Tensor:
    """[keys], added to the scores [rows, keys] for the prefix to hold `PREFIX_WEIGHT` of the weight and its first token `sink`."""
    import torch

    bias = torch.zeros(scores.shape[1], dtype=torch.float32, device=scores.device)
    if not prefix:
        return bias
    # Of the video's weight 1, each part is to have its share; the typical row is the median one.
    video = torch.logsumexp(scores[:, prefix:], -1)
    rest = 1 - PREFIX_WEIGHT - sink
    bias[:prefix] = float((video - torch.logsumexp(scores[:, :prefix], -1)).median()) + math.log(PREFIX_WEIGHT / rest)
    if sink:
        bias[0] = float((video - scores[:, 0]).median()) + math.log(sink / rest)
    return bias
