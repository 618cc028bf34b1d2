"""What `PatchSageAttention` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sageattention import available_variants
from ..sageattention.variants import VARIANTS
from . import installed, slot
from .record import LOG

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

NODE_ID = "PatchSageAttention"
DISPLAY_NAME = "Patch Sage Attention"
CATEGORY = "model_patches"
AUTO, DISABLED = "auto", "disabled"
# SDPA is what "disabled" gives, so it is no choice of its own.
CHOICES = [AUTO, DISABLED, *(v.name for v in VARIANTS.values() if v.backend != "sdpa")]

DESCRIPTION = (
    "Runs the attention of this model on quantised kernels. Attention calls that the chosen variant can't do run on the "
    "model's own attention, and the log says why, once per reason."
)


def description() -> str:
    """What the node does, and what the install hook had to say."""
    return "\n\n".join(filter(None, (DESCRIPTION, installed.report())))


MODEL_TOOLTIP = "The model to patch. It stays as it is; the output is a patched copy that shares its weights."
VARIANT_TOOLTIP = "\n".join(
    [
        f"{AUTO}: the fastest one that suits the graphics card and each call.",
        f"{DISABLED}: takes this node's patch out again, and nobody else's.",
        *(f"{v.name}: {v.summary}." for v in VARIANTS.values() if v.name in CHOICES),
    ]
)


def apply(model: ModelPatcher, variant: str) -> ModelPatcher:
    """A clone of `model` patched with `variant`, or with our patch taken out ("disabled")."""
    if variant == DISABLED:
        return slot.remove(model)
    return slot.install(model, usable(variant, model.load_device))


def usable(variant: str, device: torch.device) -> str:
    """`variant`, or "auto" where a saved workflow asks for one that this version or this machine does not have."""
    if variant == AUTO:
        return variant
    if variant not in CHOICES:
        LOG.warning("%s: variant %r is not known to this version, 'auto' is used instead; known are %s", NODE_ID, variant, CHOICES)
        return AUTO
    found = next(a for a in available_variants(device) if a.name == variant)
    if found.status == "ready":
        return variant
    LOG.warning("%s: variant %r can't run here, 'auto' is used instead: %s", NODE_ID, variant, found.reason)
    return AUTO
