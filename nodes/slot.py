"""The one place in a ComfyUI model where an attention override lives, and who owns it.

ComfyUI looks up `transformer_options["optimized_attention_override"]` at every attention call. There is one slot and the
last writer wins, so whoever writes it has to remember, and chain to, what was there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .adapter import SageOverride

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "optimized_attention_override"


def owner(model: ModelPatcher) -> Callable[..., Any] | None:
    """What is in the model's slot: our override, somebody else's, or None."""
    return _options(model).get(KEY)


def install(model: ModelPatcher, variant: str) -> ModelPatcher:
    """A clone of `model` whose attention runs on `variant`; an override of ours is replaced, any other is chained to."""
    patched = model.clone()
    options = _options(patched)
    options[KEY] = SageOverride(variant, _without_ours(options.get(KEY)))
    return patched


def remove(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` without our override: the slot holds again what we had chained to. Other overrides stay."""
    restored = model.clone()
    options = _options(restored)
    previous = _without_ours(options.get(KEY))
    if previous is None:
        options.pop(KEY, None)
    else:
        options[KEY] = previous
    return restored


def _options(model: ModelPatcher) -> dict[str, Any]:
    return model.model_options.setdefault("transformer_options", {})


def _without_ours(override: Callable[..., Any] | None) -> Callable[..., Any] | None:
    while isinstance(override, SageOverride):
        override = override.previous
    return override
