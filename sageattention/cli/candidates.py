"""The attentions that `check` and `bench` run: every variant, each of its accumulators, and torch's SDPA backends by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import api
from ..errors import Unsupported
from ..numerics.scheme import Scheme
from ..variants import VARIANTS, Candidate, Variant

if TYPE_CHECKING:
    import torch

SDPA_BACKENDS = {"sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_flash": "FLASH_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION"}


@dataclass(frozen=True)
class Attention:
    """One attention: `call(q, k, v, **keywords of sageattn)` on [B, H, N, D] tensors, inside `context()`."""

    name: str
    call: Callable[..., Any]  # the output, with return_lse (output, lse)
    scheme: Scheme | None = None  # None: unquantised, or not known before the call
    variant: Variant | None = None  # None: "auto", and what is not ours
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def variant(name: str) -> Attention:
    """The candidate of "auto", a variant's name, or "name:accumulator" such as "sageattn_qk_int8_pv_fp16_cuda:fp16+fp32".

    Raises:
        Unsupported: no such variant or accumulator.
    """
    candidate = Candidate.parse(name)
    found = VARIANTS.get(candidate.variant)
    if found is None and candidate.variant != "auto":
        raise Unsupported("variant", f"got {candidate.variant!r}, accepted are 'auto', {', '.join(map(repr, VARIANTS))}")
    accepted = found.accum if found else {}
    if candidate.accum and candidate.accum not in accepted:
        named = ", ".join(map(repr, accepted)) or "none"
        raise Unsupported("pv_accum_dtype", f"got {candidate.accum!r}, {candidate.variant} accepts {named}")
    call = functools.partial(api.sageattn, variant=candidate.variant, pv_accum_dtype=candidate.accum or None)
    scheme = accepted[candidate.accum] if candidate.accum else found.scheme if found else None
    return Attention(str(candidate), call, scheme, found)


def chosen_device(text: str | None) -> torch.device:
    """The device that `--device` names; without it CUDA where there is one, else the CPU.

    Raises:
        Unsupported: torch knows no such device, or this machine has none.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    try:
        device = torch.device(text or ("cuda" if count else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= count):
        raise Unsupported("--device", f"got {text!r}, accepted are {accepted}")
    return device


def ready(device: torch.device, *, accumulators: bool = False) -> tuple[list[Attention], list[tuple[str, str]]]:
    """The variants that run on `device`, and (name, reason) of those that don't.

    Args:
        accumulators: give a variant with several accumulators as one candidate each.
    """
    found, refused = [], []
    for availability in api.available_variants(device):
        if availability.status != "ready":
            refused.append((availability.name, f"{availability.status}: {availability.reason}"))
            continue
        accums = (accumulators and VARIANTS[availability.name].accum) or ("",)
        found += [variant(str(Candidate(availability.name, accum))) for accum in accums]
    return found, refused


def sdpa_backend(name: str) -> Attention:
    """One backend of torch's SDPA, chosen by its context; called where it can't do a shape, it raises torch's RuntimeError."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, SDPA_BACKENDS[name])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **keywords)

    return Attention(name, call, context=lambda: sdpa_kernel(backend))
