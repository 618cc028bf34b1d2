"""The variants among ComfyUI's named attention functions, "sage_auto", "sage_fp8_cuda" …, for packs that choose theirs by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..sageattention import available_variants
from ..sageattention.variants import VARIANTS
from .adapter import SageOverride
from .patch import AUTO, device
from .progress import short


def register() -> None:
    """Once, as ComfyUI imports the pack: the variants that this machine has. Nothing outside of ComfyUI."""
    attention: Any = sys.modules.get("comfy.ldm.modules.attention")
    if attention is None:
        return
    ready = [a.name for a in available_variants(device()) if a.status == "ready" and VARIANTS[a.name].has_kernels]
    for variant in (AUTO, *ready):
        name = f"sage_{short(variant)}"
        if name not in attention.REGISTERED_ATTENTION_FUNCTIONS:
            attention.register_attention_function(name, _function(attention, name, variant))


def _function(attention: Any, name: str, variant: str) -> Callable[..., Any]:
    """A variant as a core's attention function: a model's override goes first, and PyTorch's attention does what the variant refuses."""
    override = SageOverride(variant)
    own = attention.attention_pytorch
    own = getattr(own, "__wrapped__", own)

    def function(*args: Any, **kwargs: Any) -> Any:
        return override(own, *args, **kwargs)

    function.__name__ = function.__qualname__ = name
    return attention.wrap_attn(function)
