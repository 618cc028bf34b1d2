"""The offsets of packed sequences: their values are read once, for a kernel that trusts wrong ones reads outside of its tensors."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import Unsupported


class Offsets(NamedTuple):
    """What a tensor of offsets was found to hold."""

    version: int  # of the tensor, when it was read
    end: int
    longest: int


_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def check(name: str, cu_seqlens: torch.Tensor, tokens: str, total: int, max_name: str, max_seqlen: int) -> None:
    """Offsets start with 0, never fall, end with the number of tokens, and no sequence is longer than `max_seqlen`.

    Reading a tensor on a GPU waits for the GPU, so each tensor is read at its first call and again after it was written to; an
    inference tensor does not tell that it was. While a CUDA graph is captured nothing can be read: the calls before it count.

    Args:
        name, max_name: the parameters, for the message.
        tokens: the packed tensor's name; `total` is how many it has.

    Raises:
        Unsupported: one of these does not hold.
    """
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    found = _read.get(cu_seqlens)
    if found is None or found.version != version:
        if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        found = _read[cu_seqlens] = _look(name, cu_seqlens, version)
    if found.end != total:
        raise Unsupported(name, f"ends with {found.end}, {tokens} has {total} tokens; they must be equal")
    if found.longest > max_seqlen:
        raise Unsupported(max_name, f"got {max_seqlen}, {name} holds a sequence of {found.longest}; accepted is the longest length or more")


def _look(name: str, cu_seqlens: torch.Tensor, version: int) -> Offsets:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise Unsupported(name, f"starts with {offsets[0]}, accepted is 0")
    lengths = [after - before for before, after in itertools.pairwise(offsets)]
    for index, length in enumerate(lengths, 1):
        if length < 0:
            raise Unsupported(
                name, f"falls from {offsets[index - 1]} to {offsets[index]} at index {index}; accepted are offsets that never fall"
            )
    return Offsets(version, offsets[-1], max(lengths, default=0))
