"""The signed Hadamard rotation of Q and K, as numbers that PyTorch, Triton and CUDA agree on.

R[i][j] = s_i · (−1)^popcount(i & j) / (2·D), with s_i = −1 where b0·b3 + b1·b4 + b2·b5 + b6·b7 of i's bits is odd. Rows of R are
orthogonal with squared length 1/(4·D), so q · k = 4·D · (q·R) · (k·R); the factor goes into the score scale. The small,
power-of-two entries are exact in fp16 and bf16 and keep a rotated vector below half its largest element, so that
nothing overflows on the way, not even the difference of two vectors near 3e38.
The signs are a bent function (but for one bit at D = 128): what changes sign from channel to channel with a period of
a power of two, or not at all, ends up in all outputs alike. Each product of two bits is within one step of the kernels.
Rotation spreads outlier channels (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sign_bits(channel):
    """A channel is negated where the number of set bits of this is odd. Also in backends/triton/blocks.py."""
    return (channel & (channel >> 3) & 7) ^ (channel & (channel >> 1) & 64)


def gain(head_dim: int) -> float:
    """What a product of two rotated vectors must be multiplied by to be the product of the vectors themselves."""
    return 4.0 * head_dim


@functools.cache
def matrix(head_dim: int) -> torch.Tensor:
    """The rotation for a compiled head dimension (a power of two), fp32 [D, D] on the CPU."""
    import torch

    index = torch.arange(head_dim, device="cpu")
    odd = (index[:, None] & index[None, :]) ^ sign_bits(index)[:, None]
    for shift in (4, 2, 1):
        odd = odd ^ (odd >> shift)
    return (1 - 2 * (odd & 1)).to(torch.float32) / (2 * head_dim)
