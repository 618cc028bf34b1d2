"""A stand-in for both generations of ComfyUI's attention routing: what a core promises to an override, and no more."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

KEY = "optimized_attention_override"
MARK = "_inside_attn_wrapper"


class OldCore:
    """Core of 2025: the override in `transformer_options` gets the bare attention and the model's arguments.

    Attributes:
        own_calls: the (args, kwargs) with which the model's own attention ran.
    """

    def __init__(self) -> None:
        self.own_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What a model calls."""
        if MARK in kwargs:
            return self.own(*args, **kwargs)
        kwargs[MARK] = True
        override = (kwargs.get("transformer_options") or {}).get(KEY)
        return self.own(*args, **kwargs) if override is None else self.call_override(override, args, kwargs)

    def call_override(self, override: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        return override(self.own, *args, **kwargs)

    def own(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's own attention."""
        self.own_calls.append((args, kwargs))
        return sdpa(*args, **kwargs)


class Container:
    """Owns one tensor until somebody takes it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor

    def peek(self) -> torch.Tensor:
        assert self.tensor is not None, "taken twice"
        return self.tensor

    def take(self) -> torch.Tensor:
        tensor, self.tensor = self.peek(), None
        return tensor


class NewCore(OldCore):
    """Core of 2026: also takes containers, which only an override with a `container_function` gets to see."""

    def attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("preferred_attention", None)
        return super().attention(*args, **kwargs)

    def call_override(self, override: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if isinstance(args[0], Container):
            if hasattr(override, "container_function"):
                return override.container_function(*args, **kwargs)
            args = tuple(c.take() for c in args[:3]) + args[3:]
        return super().call_override(override, args, kwargs)

    def own(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().own(*(a.take() if isinstance(a, Container) else a for a in args), **kwargs)

    def importable(self) -> dict[str, ModuleType]:
        """Modules for `sys.modules`, in which an override without `func` finds `optimized_attention`."""
        modules = {name: ModuleType(name) for name in ("comfy", "comfy.ldm", "comfy.ldm.modules", "comfy.ldm.modules.attention")}

        def optimized_attention(*args: Any, **kwargs: Any) -> torch.Tensor:
            return self.attention(*args, **kwargs)

        optimized_attention.__wrapped__ = self.own
        modules["comfy.ldm.modules.attention"].optimized_attention = optimized_attention
        return modules


def sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    **others: Any,
) -> torch.Tensor:
    """ComfyUI's attention call, computed by PyTorch; so the tests' ground truth."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
    while mask is not None and mask.dim() < 4:
        mask = mask.unsqueeze(mask.dim() - 2)  # [Lq, Lk] → [1, Lq, Lk], [B, Lq, Lk] → [B, 1, Lq, Lk]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Model:
    """A ComfyUI model as a node sees it: options that a clone copies deeply, wrappers of the sampler, and a device."""

    load_device = torch.device("cpu")

    def __init__(self, override: Any = None) -> None:
        self.model_options: dict[str, Any] = {"transformer_options": {} if override is None else {KEY: override}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> Model:
        other = Model()
        other.model_options = copy.deepcopy(self.model_options)
        other.wrappers = {kind: {key: list(of) for key, of in by_key.items()} for kind, by_key in self.wrappers.items()}
        return other

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return SimpleNamespace(percent_to_sigma=lambda percent: torch.tensor(1e9 if percent <= 0 else 1.0 - percent))

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    @property
    def options(self) -> dict[str, Any]:
        return self.model_options["transformer_options"]


def sample(
    model: Model, network: Callable[..., torch.Tensor], sigmas: Sequence[float] = (1.0, 0.75, 0.5, 0.25), passes: int = 1
) -> list[torch.Tensor]:  # fmt: skip
    """What a sampler does with a patched model: its wrappers around all, and around each step; then the network, once a pass.

    Args:
        network: called with `transformer_options`.
        passes: through the network a step, where cond and uncond go one after the other.

    Returns:
        The output of each step.
    """

    def whole() -> list[torch.Tensor]:
        return [
            wrapped("calc_cond_batch", step)(None, [], torch.zeros(1), torch.tensor([sigma]), model.model_options)[0] for sigma in sigmas
        ]

    def step(inner: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]) -> list[torch.Tensor]:
        outs = []
        for i in range(passes):
            options = {**model_options["transformer_options"], "cond_or_uncond": [i], "sigmas": timestep}
            outs.append(network(dict(options)))
        return [torch.stack(outs).mean(0)]

    def wrapped(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        guider = SimpleNamespace(model_options=model.model_options, model_patcher=model)
        for wrapper in (w for of in model.wrappers.get(kind, {}).values() for w in of):
            original = functools.partial(wrapper, _Executor(original, guider))
        return original

    return wrapped("outer_sample", whole)()


class _Executor:
    """What a wrapper is given: calls the next wrapper, or what they are around."""

    def __init__(self, inside: Callable[..., Any], class_obj: Any) -> None:
        self._inside, self.class_obj = inside, class_obj

    def __call__(self, *args: Any) -> Any:
        return self._inside(*args)
