"""The shapes and input kinds that the kernels are judged on: one source for `check`, `bench`, the tests and the documents.

Everything is seeded: one (kind, shape, dtype, device, seed) always gives the same tensors. The bounds are relative L2 errors
against the fp64 oracle for bf16 inputs, output rounding (0.0017) included, one bound for each type of P and V. They are the best
figures that other quantised attention kernels reach on these kinds; nobody gives any for `logits6` and `video`, whose bounds are ours.
`docs/numerics.md` says where we stand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..numerics.constants import ERROR_BOUNDS
from . import video

if TYPE_CHECKING:
    import torch

    Randn = Callable[..., torch.Tensor]
    QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """One attention shape; lengths are in tokens.

    Attributes:
        heads_kv: heads of k and v, where they have fewer than q.
        fused: q, k and v are views of one [B, N, (Hq + 2·Hkv)·D] tensor, as models with a single layer for all three hand them over.
    """

    name: str
    batch: int
    heads: int
    len_q: int
    len_kv: int
    head_dim: int
    heads_kv: int = 0
    fused: bool = False

    @property
    def kv_heads(self) -> int:
        return self.heads_kv or self.heads

    @property
    def flops(self) -> int:
        """Floating-point operations of both products, the customary 4·B·H·Nq·Nk·D."""
        return 4 * self.batch * self.heads * self.len_q * self.len_kv * self.head_dim

    def __str__(self) -> str:
        heads = f"{self.heads}/{self.heads_kv}" if self.heads_kv else self.heads
        return f"{self.name} ({self.batch}, {heads}, {self.len_q}, {self.len_kv}, {self.head_dim})"


# What models ask for: images (Flux, Qwen-Image, SDXL, SD 1.5), their cross attention, WAN video at 480p, and two round shapes.
SHAPES: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("flux_512", 1, 24, 1536, 1536, 128),
        Shape("flux_1024", 1, 24, 4608, 4608, 128),
        Shape("qwen", 1, 24, 4347, 4347, 128),
        Shape("sdxl_1024", 2, 10, 4096, 4096, 64),
        Shape("sd15", 2, 8, 4096, 4096, 40),
        Shape("sdxl_cross", 2, 10, 4096, 77, 64),
        Shape("wan_cross", 1, 40, 32760, 512, 128),
        Shape("wan_480p", 1, 40, 32760, 32760, 128),
        Shape("hd64_16k", 4, 32, 16384, 16384, 64),
        Shape("hd128_16k", 4, 32, 16384, 16384, 128),
    )
}

# Models of the end of 2026, at batch 1: Z-Image, FLUX.2, Krea 2, Ideogram 4, Qwen-Image 2.1 with an image to edit, and video by LTX (with
# its audio), MiniMax H3, HunyuanVideo 1.5 and Wan 2.2, up to 219,500 tokens.
MODELS: dict[str, Shape] = {
    s.name: s
    for s in (
        Shape("zimage_1024", 1, 30, 4352, 4352, 128, fused=True),
        Shape("flux2_1024", 1, 48, 4608, 4608, 128, fused=True),
        Shape("krea2", 1, 48, 4608, 4608, 128, heads_kv=12),
        Shape("ideogram4", 1, 18, 4352, 4352, 256),
        Shape("qwen21_edit", 1, 32, 4096, 8704, 128),
        Shape("ltx_544p", 1, 32, 8160, 8160, 128),
        Shape("ltx_av", 1, 32, 8160, 512, 64),
        Shape("ltx_1080p", 1, 32, 32640, 32640, 128),
        Shape("h3_480p", 1, 56, 15360, 15360, 128, fused=True),
        Shape("h3_768p_5s", 1, 56, 37700, 37700, 128, fused=True),
        Shape("hunyuan15_480p", 1, 16, 49546, 49546, 128),
        Shape("wan_720p", 1, 40, 75600, 75600, 128),
        Shape("h3_768p_15s", 1, 56, 104050, 104050, 128, fused=True),
        Shape("hunyuan15_720p", 1, 16, 111600, 111600, 128),
        Shape("h3_1080p_15s", 1, 56, 219500, 219500, 128, fused=True),
    )
}

ACCURACY = Shape("accuracy", 1, 8, 3001, 3001, 128)  # odd lengths: the last tile is never full


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        build: (randn, shape) → q, k, v in fp32; `randn(*size)` draws from the seeded generator.
        bounds: relative L2 error that a variant may have, by the type of its P and V ("fp16", "fp8", "int8").
        gain: how far ⟨out, ref⟩ / ⟨ref, ref⟩ may be from 1, where that is what the kind is about.
        len_kv: keys that the kind needs at full size; 0 leaves the shape's.
    """

    name: str
    summary: str
    build: Callable[[Randn, Shape], QKV]
    bounds: dict[str, float]
    gain: float | None = None
    len_kv: int = 0

    def sized(self, shape: Shape) -> Shape:
        """`shape` with as many keys as this kind needs."""
        return replace(shape, len_kv=self.len_kv) if self.len_kv else shape


def _plain(randn: Randn, s: Shape) -> QKV:
    kv = (s.batch, s.heads, s.len_kv, s.head_dim)
    return randn(s.batch, s.heads, s.len_q, s.head_dim), randn(*kv), randn(*kv)


def _channel_bias(randn: Randn, s: Shape) -> QKV:
    q, k, v = _plain(randn, s)
    per_channel = (s.batch, s.heads, 1, s.head_dim)
    return q, k + 4 * randn(*per_channel), v + randn(*per_channel)


def _heavy_tailed(randn: Randn, s: Shape) -> QKV:
    q, k, v = _plain(randn, s)
    channels = _chosen(randn(s.batch, s.heads, 1, s.head_dim), 4)
    q, k = (t * (1 + 7 * channels) for t in (q, k))
    q = q * (1 + 7 * _chosen(randn(s.batch, s.heads, s.len_q, 1).mT, 8).mT)
    k = k * (1 + 7 * _chosen(randn(s.batch, s.heads, s.len_kv, 1).mT, 8).mT)
    return q, k, v


def _chosen(draw: torch.Tensor, count: int) -> torch.Tensor:
    """1 at the `count` largest elements of each last-dimension row of `draw`, 0 elsewhere."""
    count = min(count, draw.shape[-1])
    return (draw >= draw.topk(count, dim=-1).values[..., -1:]).to(draw.dtype)


def _large_v(randn: Randn, s: Shape) -> QKV:
    q, k, v = _plain(randn, s)
    return q, k, v * 3e5


def _scaled(factor: float) -> Callable[[Randn, Shape], QKV]:
    def build(randn: Randn, s: Shape) -> QKV:
        q, k, v = _plain(randn, s)
        return q * factor, k * factor, v

    return build


def _sink(randn: Randn, s: Shape) -> QKV:
    q, k, v = _plain(randn, s)
    direction = randn(s.batch, s.heads, 1, s.head_dim)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    q = q + (s.head_dim**0.5 - (q * direction).sum(-1, keepdim=True)) * direction  # every q·direction is √D
    k = k * 0.02
    k[:, :, :1] = 8 * direction  # so this key's logit is 8 for every query, all others' about 0
    return q, k, v + 1


def _coherent_v(randn: Randn, s: Shape) -> QKV:
    import torch

    q, k, v = _plain(randn, s)
    position = torch.linspace(0, 1, s.len_kv, dtype=torch.float32, device=v.device)[:, None]
    period = 1 + torch.arange(s.head_dim, device=v.device) % 5
    phase = randn(s.batch, s.heads, 1, s.head_dim)
    return q, k, 1 + 0.5 * torch.sin(6.2832 * position * period + phase) + 0.05 * v


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("normal", "standard normal Q, K and V", _plain, {"fp16": 0.0110, "fp8": 0.0385, "int8": 0.0150}),
        Kind("channel_bias", "K with a bias per channel, V with a mean", _channel_bias, {"fp16": 0.0020, "fp8": 0.0029, "int8": 0.0020}),
        Kind(
            "heavy_tailed",
            "four channels of Q and K, and eight of their tokens, eight times larger",
            _heavy_tailed,
            {"fp16": 0.0211, "fp8": 0.0385, "int8": 0.0211},
        ),
        Kind("large_v", "V of the order 3e5, beyond fp16's range", _large_v, {"fp16": 0.0110, "fp8": 0.0385, "int8": 0.0150}),
        Kind("peaked", "Q and K 16 times larger: one key takes all", _scaled(16.0), {"fp16": 0.200, "fp8": 0.200, "int8": 0.200}),
        Kind("logits6", "logits with a standard deviation of 6 nats", _scaled(6**0.5), ERROR_BOUNDS),
        Kind(
            "sink",
            "one key 8 nats above a flat tail of 16 thousand",
            _sink,
            {"fp16": 0.0027, "fp8": 0.0060, "int8": 0.0040},
            len_kv=16385,
        ),
        Kind(
            "coherent_v",
            "V of mean 1 that varies slowly along the tokens",
            _coherent_v,
            {"fp16": 0.0050, "fp8": 0.0050, "int8": 0.0050},
            gain=0.005,
            len_kv=32768,
        ),
        Kind(
            "video",
            "a grid of tokens behind a prefix, heads of different reach (made up)",
            video.build,
            {"fp16": 0.0055, "fp8": 0.018, "int8": 0.010},
        ),
    )
}


def make(
    kind: str, shape: Shape, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] of one kind, `shape` taken as it is, in `dtype` (default bf16).

    A kind makes as many heads of k and v as q has; where the shape has fewer, each group of q's heads gets the first one's.

    Raises:
        KeyError: no such kind.
        ValueError: the kind's values do not fit `dtype`.
    """
    import torch

    dtype = dtype or torch.bfloat16
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float32, device=device)

    group = shape.heads // shape.kv_heads
    q, k, v = KINDS[kind].build(randn, shape)
    q, k, v = (t.to(dtype) for t in (q, k[:, ::group], v[:, ::group]))
    if not all(bool(t.isfinite().all()) for t in (q, k, v)):
        raise ValueError(f"{kind!r} inputs do not fit into {dtype}")
    return _fused(q, k, v) if shape.fused else (q, k, v)


def _fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> QKV:
    """[B, H, N, D] each, as views of one tensor whose rows are tokens."""
    import torch

    rows = torch.cat([t.transpose(1, 2) for t in (q, k, v)], 2).transpose(1, 2)
    q, k, v = rows.split([t.shape[1] for t in (q, k, v)], 1)
    return q, k, v


def relative_l2(out: torch.Tensor, exact: torch.Tensor) -> float:
    """‖out − exact‖ / ‖exact‖ over all elements, in fp64; NaN or Inf where `out` holds one."""
    exact = exact.double()
    return float((out.double() - exact).norm() / exact.norm())


def gain(out: torch.Tensor, exact: torch.Tensor) -> float:
    """⟨out, exact⟩ / ⟨exact, exact⟩: 1 where nothing shrinks, less where an accumulator loses coherent sums."""
    exact = exact.double()
    return float((out.double() * exact).sum() / exact.square().sum())
