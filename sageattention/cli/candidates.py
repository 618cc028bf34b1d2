"""The attentions that `check` and `bench` run: every variant, each of its accumulators, and torch's SDPA backends by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import api
from ..errors import Unsupported
from ..numerics.scheme import Scheme
from ..variants import VARIANTS

if TYPE_CHECKING:
    import torch

SDPA_BACKENDS = {"sdpa_cudnn": "CUDNN_ATTENTION", "sdpa_flash": "FLASH_ATTENTION", "sdpa_efficient": "EFFICIENT_ATTENTION"}


@dataclass(frozen=True)
class Candidate:
    """One attention: `call(q, k, v, **keywords of sageattn)` on [B, H, N, D] tensors, inside `context()`."""

    name: str
    call: Callable[..., torch.Tensor]
    scheme: Scheme | None  # None: unquantised
    context: Callable[[], AbstractContextManager] = nullcontext


def variant(name: str) -> Candidate:
    """The candidate of "auto", a variant's name, or "name:accumulator" such as "sageattn_qk_int8_pv_fp16_cuda:fp16+fp32".

    Raises:
        Unsupported: no such variant or accumulator.
    """
    name, _, accum = name.partition(":")
    if name != "auto" and name not in VARIANTS:
        raise Unsupported("variant", f"got {name!r}, accepted are 'auto', {', '.join(map(repr, VARIANTS))}")
    if not accum:
        return Candidate(name, functools.partial(api.sageattn, variant=name), None if name == "auto" else VARIANTS[name].scheme)
    accepted = VARIANTS[name].accum if name != "auto" else {}
    if accum not in accepted:
        raise Unsupported("pv_accum_dtype", f"got {accum!r}, {name} accepts {', '.join(map(repr, accepted)) or 'none'}")
    return Candidate(f"{name}:{accum}", functools.partial(getattr(api, name), pv_accum_dtype=accum), accepted[accum])


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


def ready(device: torch.device, *, accumulators: bool = False) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """The variants that run on `device`, and (name, reason) of those that don't.

    Args:
        accumulators: give a variant with several accumulators as one candidate each.
    """
    found, refused = [], []
    for availability in api.available_variants(device):
        if availability.status != "ready":
            refused.append((availability.name, f"{availability.status}: {availability.reason}"))
            continue
        accums = VARIANTS[availability.name].accum if accumulators else ()
        found += [variant(f"{availability.name}:{accum}") for accum in accums] or [variant(availability.name)]
    return found, refused


def sdpa_backend(name: str) -> Candidate:
    """One backend of torch's SDPA, chosen by its context; called where it can't do a shape, it raises torch's RuntimeError."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, SDPA_BACKENDS[name])
    return Candidate(name, torch.nn.functional.scaled_dot_product_attention, None, lambda: sdpa_kernel(backend))
