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
            "required": {
                "model": ("MODEL", {"tooltip": patch.MODEL_TOOLTIP}),
                "variant": (patch.CHOICES, {"default": patch.AUTO, "tooltip": patch.VARIANT_TOOLTIP}),
            }
        }

    @classmethod
    def VALIDATE_INPUTS(cls, variant: str) -> bool:
        """Accept any variant, as the V3 node does."""
        return True

    def execute(self, model: Any, variant: str) -> tuple[Any]:
        return (patch.apply(model, variant),)


NODES = [PatchSageAttention]
