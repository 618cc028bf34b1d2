"""Values of small tensors that a call depends on, read once: reading one on a GPU waits for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_read: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor → {look: (version, found)}


def once(tensor: torch.Tensor, look: Callable[..., Any], *arguments: Any) -> Any:
    """`look(tensor, *arguments)`, called for a tensor's first call and again after it was written to.

    torch does not tell of writes through `.data`, a NumPy array, or to an inference tensor: these are not looked at again. While a CUDA
    graph is captured nothing can be read: the result of the calls before counts, and None says that there was none.
    """
    version = 0 if tensor.is_inference() else tensor._version
    known = _read.setdefault(tensor, {})
    found = known.get(look)
    if found is None or found[0] != version:
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        found = known[look] = version, look(tensor, *arguments)
    return found[1]
