"""A miniature diffusion transformer with random weights: enough of a DiT to sample a picture through an attention override.

It is built like the models that people run (tokens of a latent, adaptive layer norm, self and cross attention, an MLP, Euler steps of a
rectified flow) and calls its attention as ComfyUI's models do, `transformer_options` included, so the node's override
works on it unchanged. Random weights know no pictures: what it paints is a smooth pattern of its position embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Attention = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Config:
    """Sizes. `calls` attention calls make one sample."""

    side: int = 24  # of the square latent
    channels: int = 3
    heads: int = 2
    head_dim: int = 64
    depth: int = 2
    context: int = 77  # tokens of conditioning
    steps: int = 4

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def calls(self) -> int:
        return 2 * self.depth * self.steps


class Block(nn.Module):
    """Self attention, cross attention and an MLP, each behind a modulated layer norm and a gate."""

    def __init__(self, config: Config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.modulation = nn.Linear(width, 6 * width)
        self.self_qkv, self.self_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.cross_q, self.cross_kv, self.cross_out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: torch.Tensor, context: torch.Tensor, time: torch.Tensor, attention: Attention, options: dict[str, Any]):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time)[:, None].chunk(6, dim=-1)
        q, k, v = self.self_qkv(self.norm(x) * (1 + scale) + shift).chunk(3, dim=-1)
        x = x + gate * self.self_out(attention(q, k, v, self.heads, transformer_options=options))
        k, v = self.cross_kv(context).chunk(2, dim=-1)
        x = x + self.cross_out(attention(self.cross_q(self.norm(x)), k, v, heads=self.heads, transformer_options=options))
        return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class Miniature(nn.Module):
    """x [B, 3, S, S] at time t in [0, 1] (1 is noise) and context [B, C, width] to the latent that x came from, [B, 3, S, S]."""

    def __init__(self, config: Config, attention: Attention, seed: int = 0):
        super().__init__()
        self.config, self.attention = config, attention
        self.into, self.out = nn.Linear(config.channels, config.width), nn.Linear(config.width, config.channels)
        self.time = nn.Sequential(nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.register_buffer("positions", _positions(config), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            # Larger queries and keys: real models' attention is peaked, not a plain average.
            gain = 1.6 if "qkv" in name or "cross_q" in name else 1.0
            nn.init.normal_(weight, std=gain * weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2, generator=generator)
        with torch.no_grad():
            self.into.weight.mul_(0.4)  # less of the noise, more of the position: a pattern that an eye can compare

    def forward(self, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        hidden = self.into(x.flatten(2).mT) + self.positions
        time = self.time(_sinusoid(1000 * t[:, None], self.config.width))
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, context, time, self.attention, options | {"block_index": index})
        return torch.tanh(self.out(self.norm(hidden))).mT.reshape_as(x)


def sample(model: Miniature, override: Any = None, seed: int = 0, on_step: Callable[[int], None] | None = None) -> torch.Tensor:
    """One latent, [3, S, S] in −1 to 1, by Euler steps of a rectified flow; `override` takes ComfyUI's attention slot."""
    c = model.config
    options = {} if override is None else {"optimized_attention_override": override}
    generator = torch.Generator().manual_seed(seed)
    device = model.positions.device
    x = torch.randn(1, c.channels, c.side, c.side, generator=generator).to(device)
    context = torch.randn(1, c.context, c.width, generator=generator).to(device)
    times = torch.linspace(1, 0, c.steps + 1).tolist()
    with torch.inference_mode():
        for step, (now, then) in enumerate(itertools.pairwise(times), 1):
            clean = model(x, torch.full((1,), now, device=device), context, options)
            x = clean + (x - clean) * (then / now)
            if on_step is not None:
                on_step(step)
    return x[0]


def _positions(config: Config) -> torch.Tensor:
    """Sines and cosines of both coordinates, [tokens, width], low frequencies first: what makes the pattern smooth."""
    side = torch.linspace(-1, 1, config.side)
    y, x = torch.meshgrid(side, side, indexing="ij")
    frequency = math.pi * torch.logspace(-1, 1, config.width // 4, base=2.0)
    angles = torch.cat([y.reshape(-1, 1) * frequency, x.reshape(-1, 1) * frequency], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def _sinusoid(x: torch.Tensor, width: int) -> torch.Tensor:
    frequency = torch.exp(-math.log(10_000.0) * torch.arange(width // 2, device=x.device) / (width // 2))
    return torch.cat([(x * frequency).cos(), (x * frequency).sin()], dim=-1)
