"""What `PatchSageAttention` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from ..sageattention import available_variants
from ..sageattention.variants import VARIANTS
from . import installed, slot
from .adapter import SageOverride
from .guard import Guard
from .record import LOG
from .schedule import Blocks, Schedule, Window

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
    found = available_variants(device())
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


def device() -> torch.device | str:
    """The device that ComfyUI's models run on; a CPU outside of ComfyUI."""
    management = sys.modules.get("comfy.model_management")
    return management.get_torch_device() if management else "cpu"


START_TOOLTIP = (
    "From which part of the sampling on: 0 is the first step.\n"
    "Earlier steps run on the model's own attention. The first\n"
    "steps decide the composition: raise it where that changes."
)
END_TOOLTIP = "Up to which part of the sampling: 1 is the last step.\nLater steps run on the model's own attention."
BLOCKS_TOOLTIP = (
    "Only these blocks of the model: numbers and ranges, such as\n"
    "0, 1, 47-49. Empty: all of them. The others run on the\n"
    "model's own attention. For models that tell their blocks."
)
MAX_ERROR_TOOLTIP = (
    "The guard; 0 turns it off. Each layer's result is compared\n"
    "with exact attention, and where it is off by more than this,\n"
    "a more accurate variant or exact attention takes over.\n"
    "0.05 is a good bound. Use it where a picture comes out noisy\n"
    "or black; the report node shows what it found."
)


def problem(start_percent: float | None, end_percent: float | None, blocks: str | None, max_error: float | None) -> str:
    """What is wrong with the node's inputs, in a sentence for the user; "" where nothing is. An input that is linked is None."""
    window = Window(0.0 if start_percent is None else start_percent, 1.0 if end_percent is None else end_percent)
    if window.problem():
        return window.problem()
    try:
        Blocks.parse(blocks or "")
    except ValueError as error:
        return f"blocks: {error}"
    if max_error is not None and not 0 <= max_error < float("inf"):
        return f"max_error is {max_error:g}, but has to be 0 (the guard is off) or above, such as 0.05."
    return ""


def apply(
    model: ModelPatcher, variant: str, start_percent: float = 0.0, end_percent: float = 1.0, blocks: str = "", max_error: float = 0.0,
    node_id: str = "",
) -> ModelPatcher:  # fmt: skip
    """A clone of `model` patched with `variant`, or with our patch taken out ("disabled").

    Args:
        start_percent, end_percent: the part of the sampling in which the patch is at work, 0 to 1.
        blocks: the blocks that it is for, "0, 1, 47-49"; "" for all.
        max_error: the relative L2 error that a layer's worst head may have, 0 for any.
        node_id: of the node, which shows a line while it samples; "" for none.

    Raises:
        ValueError: an input makes no sense, with a sentence for the user.
    """
    if variant == DISABLED:
        return slot.remove(model, SageOverride)
    wrong = problem(start_percent, end_percent, blocks, max_error)
    if wrong:
        raise ValueError(wrong)
    schedule = Schedule(Window(start_percent, end_percent), Blocks.parse(blocks) or None)
    override = SageOverride(
        usable(variant, model.load_device),
        schedule=None if schedule == Schedule() else schedule,
        guard=Guard(max_error) if max_error else None,
    )
    override.node_id = node_id or ""
    return slot.install(model, override)


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
