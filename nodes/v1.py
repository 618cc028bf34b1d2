"""The nodes for cores that have no `comfy_api.latest`."""

from __future__ import annotations

from typing import Any

from . import patch


class PatchSageAttention:
    """MODEL in, patched MODEL out."""

    NODE_ID = patch.NODE_ID
    DISPLAY_NAME = patch.DISPLAY_NAME
    CATEGORY = patch.CATEGORY
    DESCRIPTION = patch.description()
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": patch.MODEL_TOOLTIP})},
            # A prompt that comes by the API may leave it out.
            "optional": {"variant": (patch.CHOICES, {"default": patch.AUTO, "tooltip": patch.variant_tooltip()})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, variant: str = patch.AUTO) -> bool:
        """Accept any variant, as the V3 node does."""
        return True

    def execute(self, model: Any, variant: str = patch.AUTO) -> tuple[Any]:
        return (patch.apply(model, variant),)


NODES = [PatchSageAttention]
