"""Names of torch's that are not public, and what stands in for each where a release has it elsewhere or not at all. Nothing else
of the package uses such a name."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
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
# Which of its backends torch tries first, as numbers of torch.nn.attention.SDPBackend.
_backend_order: Callable[[], list[int]] = _found("_C._get_sdp_priority_order", list)
_set_backend_order: Callable[[list[int]], None] = _found("_C._set_sdp_priority_order", lambda order: None)
_choose_backend: Callable[..., int] = _found("_fused_sdp_choice", lambda *qkv: 0)
# Keeps the current stream waiting for a number of cycles.
gpu_sleep: Callable[[int], None] = _found("cuda._sleep", lambda cycles: None)
# The handle of a device's current stream; the public way makes an object first.
current_stream: Callable[[int], int] = _found("_C._cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream)
# How many tensors, and the Python object if there is one, have a storage, by its `_cdata`; None where torch does not tell.
_storage_uses: Callable[[int], int] | None = _found("_C._storage_Use_Count", None)

# Flash, memory-efficient, math, cuDNN, other: the order before torch's first choice, which puts cuDNN first on cards where that is faster.
_UNSETTLED = [1, 2, 0, 3, 4]
_CUDNN_FIRST = [3, 1, 2, 0, 4]
_CUDNN_CARDS = ((9, 0), (10, 0))
_CUDNN_SINCE = 91501  # as torch asks for


def attention_by_cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None,
    *,
    is_causal: bool, scale: float, enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """`attention` where torch `prefers_cudnn`, in whatever state its order of backends is; only for calls that really run.

    A `torch.nn.attention.sdpa_kernel(…, set_priority=True)` around a process's first call, as ComfyUI has it, makes torch (2.11) forget
    that preference: what the context restores is the order from before torch looked at the card. On an H200 all later calls take 1.9
    times as long, with a mask 3.3 times.
    """
    if not _settled:
        _settle(query.device)
    forgotten = _backend_order() == _UNSETTLED
    if forgotten:
        _set_backend_order(_CUDNN_FIRST)
    try:
        return attention(query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    finally:
        if forgotten:
            _set_backend_order(_UNSETTLED)


@functools.cache
def prefers_cudnn(index: int) -> bool:
    """Whether torch prefers cuDNN on a device."""
    if torch.version.cuda is None or "TORCH_CUDNN_SDPA_DEPRIORITIZED" in os.environ:
        return False
    return torch.cuda.get_device_capability(index) in _CUDNN_CARDS and _cudnn_version() >= _CUDNN_SINCE


def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


_settled = False


def _settle(device: torch.device) -> None:
    """Have torch look at the card, once: else it would be this module that makes it forget."""
    global _settled
    for_any_backend = torch.empty((1, 1, 8, 64), dtype=torch.float16, device=device)  # whichever the caller has left enabled
    _choose_backend(for_any_backend, for_any_backend, for_any_backend)
    _settled = True


def alone(t: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether nothing but these has the memory of `t`: no other tensor, in Python or C++, no storage that somebody keeps, and no other
    library.

    Args:
        t, others: no two of them one tensor under two names, and each made by `detach`: a view keeps the tensor that it was made of.
    """
    if _storage_uses is None or not t.untyped_storage().resizable():  # memory of another library's is of a fixed size
        return False
    own = sum(other.untyped_storage()._cdata == t.untyped_storage()._cdata for other in (t, *others))
    nobody_else_s = torch.empty(1, dtype=torch.uint8, device="cpu")  # what looking at a storage adds is each release's own
    return _holders(t) - own == _holders(nobody_else_s) - 1


def _holders(t: torch.Tensor) -> int:
    assert _storage_uses is not None
    storage = t.untyped_storage()
    return _storage_uses(storage._cdata) + sys.getrefcount(storage)
