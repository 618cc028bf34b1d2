"""Whether a call is real, or only looked at by a tracer; and whether autograd records it. Importing it needs no torch."""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def traced(q: torch.Tensor) -> bool:
    """Whether a call outside of torch.compile is only looked at – under a dispatch mode such as FakeTensorMode or make_fx's, `transformed`,
    or with a fake tensor: then it has to be one registered operator."""
    internals = _internals()
    if internals.dispatch_modes() or transformed():
        return True
    return isinstance(q, internals.FAKE_TENSORS)


def transformed() -> bool:
    """Whether torch.jit.trace, or a transform of torch.func such as vmap, sees only torch's own operators: a kernel would escape the one
    and find no memory in the other's tensors."""
    internals = _internals()
    return internals.is_tracing() or internals.transform() is not None


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records a call with these: for a backward pass, or with a tangent beside it (forward mode)."""
    for t in tensors:
        if t is not None and t.requires_grad:
            import torch

            if torch.is_grad_enabled():
                return True
            break
    forward = sys.modules.get("torch.autograd.forward_ad")
    if forward is None or getattr(forward, "_current_level", 0) < 0:  # as its `unpack_dual` asks first, each time
        return False
    return any(t is not None and forward.unpack_dual(t).tangent is not None for t in tensors)


@functools.cache
def _internals() -> ModuleType:
    from . import torch_internals

    return torch_internals
