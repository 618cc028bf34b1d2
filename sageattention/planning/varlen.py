"""cu_seqlens of packed sequences, validated once per tensor (a device sync): wrong offsets would make a kernel read out of bounds."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from ..errors import Unsupported
from .tensor_values import once


class Offsets(NamedTuple):
    """What a tensor of offsets was found to hold."""

    all: tuple[int, ...]
    longest: int


def check(name: str, cu_seqlens: torch.Tensor, tokens: str, total: int, max_name: str, max_seqlen: int) -> tuple[int, ...] | None:
    """The offsets, None where they can't be read (see `once`).

    They start with 0, never fall, end with the number of tokens, and no sequence is longer than `max_seqlen`.

    A tensor is read when it is first seen and after it was written to, see `once`.

    Args:
        name, max_name: the parameters, for the message.
        tokens: the packed tensor's name; `total` is how many it has.

    Raises:
        Unsupported: one of these does not hold.
    """
    found = once(cu_seqlens, _look, name)
    if found is None:
        return None
    if found.all[-1] != total:
        raise Unsupported(name, f"ends with {found.all[-1]}, {tokens} has {total} tokens; they must be equal")
    if found.longest > max_seqlen:
        raise Unsupported(max_name, f"got {max_seqlen}, {name} holds a sequence of {found.longest}; accepted is the longest length or more")
    return found.all


def _look(cu_seqlens: torch.Tensor, name: str) -> Offsets:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise Unsupported(name, f"starts with {offsets[0]}, accepted is 0")
    lengths = [after - before for before, after in itertools.pairwise(offsets)]
    for index, length in enumerate(lengths, 1):
        if length < 0:
            raise Unsupported(
                name, f"falls from {offsets[index - 1]} to {offsets[index]} at index {index}; accepted are offsets that never fall"
            )
    return Offsets(tuple(offsets), max(lengths, default=0))
