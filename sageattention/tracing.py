"""Whether a call is real, or only looked at by a tracer."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

_modes, _is_tracing, _transform = torch._C._len_torch_dispatch_stack, torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack


def traced(q: torch.Tensor) -> bool:
    """Whether a call outside of torch.compile is only looked at – under a dispatch mode such as FakeTensorMode or make_fx's, `transformed`,
    or with a fake tensor: then it has to be one registered operator."""
    if _modes() or transformed():
        return True
    return type(q) is not torch.Tensor and isinstance(q, FakeTensor)


def transformed() -> bool:
    """Whether torch.jit.trace, or a transform of torch.func such as vmap, sees only torch's own operators: a kernel would escape the one
    and find no memory in the other's tensors."""
    return _is_tracing() or _transform() is not None
