"""What `PatchSageAttention` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

import sys
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
PREFIX = "sageattn_qk_int8_pv_"
# SDPA is what "disabled" gives, and `reference` is for tests: a saved workflow that names it still runs it.
CHOICES = [AUTO, DISABLED, *(v.name for v in VARIANTS.values() if v.has_kernels)]

DESCRIPTION = (
    "Runs the attention of this model on quantised kernels. Attention calls that the chosen variant can't do run on the "
    "model's own attention, and the log says why, once per reason."
)


def description() -> str:
    """What the node does, and what the install hook had to say."""
    return "\n\n".join(filter(None, (DESCRIPTION, installed.report())))


MODEL_TOOLTIP = "The model to patch. It stays as it is; the output is a patched copy that shares its weights."


def variant_tooltip() -> str:
    """What the choices are and which of them this machine lacks, in six lines: the front end cuts off a taller tooltip."""
    found = available_variants(_device())
    lacking = [a.name.removeprefix(PREFIX) for a in found if a.name in CHOICES and a.status != "ready"]
    return "\n".join(
        [
            f"{AUTO}: the fastest one that suits the graphics card and each call.",
            f"{DISABLED}: takes this node's patch out again, and nobody else's.",
            "…fp16_cuda: the most accurate; …fp16_triton: the same in Triton.",
            "…fp8_cuda: FP8 for V, on RTX 40xx and newer; …fp8_cuda_sm90: on H100 and H200.",
            "…int8_cuda: INT8 for V; the fastest on GeForce cards, by their rates.",
            f"Not on this machine: {', '.join(lacking)}." if lacking else "This machine has them all.",
        ]
    )


def _device() -> torch.device | str:
    """The device that ComfyUI's models run on; a CPU outside of ComfyUI."""
    management = sys.modules.get("comfy.model_management")
    return management.get_torch_device() if management else "cpu"


def apply(model: ModelPatcher, variant: str) -> ModelPatcher:
    """A clone of `model` patched with `variant`, or with our patch taken out ("disabled")."""
    if variant == DISABLED:
        return slot.remove(model)
    return slot.install(model, usable(variant, model.load_device))


def usable(variant: str, device: torch.device) -> str:
    """`variant`, or "auto" where a saved workflow asks for one that this version or this machine does not have."""
    if variant == AUTO:
        return variant
    if variant not in CHOICES and variant not in VARIANTS:
        LOG.warning("%s: variant %r is not known to this version, 'auto' is used instead; known are %s", NODE_ID, variant, CHOICES)
        return AUTO
    found = next(a for a in available_variants(device) if a.name == variant)
    if found.status == "ready":
        return variant
    LOG.warning("%s: variant %r can't run here, 'auto' is used instead: %s", NODE_ID, variant, found.reason)
    return AUTO
