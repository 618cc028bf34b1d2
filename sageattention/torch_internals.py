"""Names of torch's that are not public, and what stands in for each where a release has it elsewhere or not at all. Nothing else
of the package uses such a name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch


def _found(path: str, otherwise: Any) -> Any:
    """torch's name at a dotted path, else `otherwise`."""
    try:
        return functools.reduce(getattr, path.split("."), torch)
    except AttributeError:
        return otherwise


def _imported(module: str, name: str) -> tuple[type, ...]:
    """A class of a module of torch's; none where it has no such."""
    with contextlib.suppress(ImportError, AttributeError):
        return (getattr(__import__(f"torch.{module}", fromlist=[name]), name),)
    return ()


# How many dispatch modes are active, such as FakeTensorMode or make_fx's.
dispatch_modes: Callable[[], int] = _found("_C._len_torch_dispatch_stack", lambda: 0)
# Whether torch.jit.trace records.
is_tracing: Callable[[], bool] = _found("_C._is_tracing", torch.jit.is_tracing)
# The innermost transform of torch.func, such as vmap's, or None.
transform: Callable[[], object] = _found("_C._functorch.peek_interpreter_stack", lambda: None)
# Tensors without data, and those that stand for them while a graph is made.
FAKE_TENSORS = _imported("_subclasses.fake_tensor", "FakeTensor")
FUNCTIONAL_TENSORS = _imported("_subclasses.functional_tensor", "FunctionalTensor")
# A context in which an operator is called below autograd.
below_autograd: Callable[[], contextlib.AbstractContextManager[Any]] = _found("_C._AutoDispatchBelowAutograd", torch.no_grad)
# torch's attention by its own name: torch.nn.functional's may have been replaced, by one of this package's among others.
attention: Callable[..., torch.Tensor] = _found("_C._nn.scaled_dot_product_attention", torch.nn.functional.scaled_dot_product_attention)
# Keeps the current stream waiting for a number of cycles.
gpu_sleep: Callable[[int], None] = _found("cuda._sleep", lambda cycles: None)
# The handle of a device's current stream; the public way makes an object first.
current_stream: Callable[[int], int] = _found("_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
