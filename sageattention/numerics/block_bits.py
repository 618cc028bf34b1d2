"""Sets of KV blocks as packed bits, the form that the router hands to the kernels."""

from __future__ import annotations

import torch

WORD_BITS = 32


def words(blocks: int) -> int:
    """32-bit words that hold one bit for each of `blocks` KV blocks."""
    return -(-blocks // WORD_BITS)


def pack(chosen: torch.Tensor) -> torch.Tensor:
    """bool [..., blocks] to int32 [..., words]: block t is bit t % 32 of word t // 32; bits beyond the last block are 0."""
    padded = torch.nn.functional.pad(chosen, (0, -chosen.shape[-1] % WORD_BITS))
    bits = padded.unflatten(-1, (-1, WORD_BITS)).int()
    # Int32 sums wrap around: the top bit is the sign.
    return (bits << torch.arange(WORD_BITS, dtype=torch.int32, device=chosen.device)).sum(-1, dtype=torch.int32)


def unpack(bits: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse: int32 [..., words] to bool [..., blocks]."""
    shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=bits.device)
    return (bits[..., None] >> shifts & 1).flatten(-2)[..., :blocks].bool()
