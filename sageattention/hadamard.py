"""The signed Hadamard rotation of Q and K, as numbers that PyTorch, Triton and CUDA agree on.

R[i][j] = s_i · (−1)^popcount(i & j) / (2·D), with s_i = −1 where bit 31 of i · 0x9E3779B1 (mod 2³²) is set. Rows of R are
orthogonal with squared length 1/(4·D), so q · k = 4·D · (q·R) · (k·R); the factor goes into the score scale. The small,
power-of-two entries are exact in fp16 and bf16 and keep a rotated vector below half its largest element, so that
nothing overflows on the way, not even the difference of two vectors near 3e38.
Rotation spreads outlier channels (QuaRot, arXiv:2404.00456; SpinQuant, arXiv:2405.16406).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIGN_MULTIPLIER = 0x9E3779B1


def gain(head_dim: int) -> float:
    """What a product of two rotated vectors must be multiplied by to be the product of the vectors themselves."""
    return 4.0 * head_dim


@functools.cache
def matrix(head_dim: int) -> torch.Tensor:
    """The rotation for a compiled head dimension (a power of two), fp32 [D, D] on the CPU."""
    import torch

    index = torch.arange(head_dim)
    parity = index[:, None] & index[None, :]
    for shift in (4, 2, 1):
        parity = parity ^ (parity >> shift)
    sign = (index * SIGN_MULTIPLIER >> 31) & 1
    return (1.0 - 2.0 * ((parity ^ sign[:, None]) & 1)) / (2 * head_dim)
