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
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {"model": ("MODEL", {"tooltip": patch.MODEL_TOOLTIP})},
            # A prompt that comes by the API may leave them out, and one saved by an earlier version does.
            "optional": {
                "variant": (patch.CHOICES, {"default": patch.AUTO, "tooltip": patch.variant_tooltip()}),
                "start_percent": ("FLOAT", {"default": 0.0, **share, "tooltip": patch.START_TOOLTIP}),
                "end_percent": ("FLOAT", {"default": 1.0, **share, "tooltip": patch.END_TOOLTIP}),
                "blocks": ("STRING", {"default": "", "tooltip": patch.BLOCKS_TOOLTIP}),
                "max_error": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.001, "tooltip": patch.MAX_ERROR_TOOLTIP}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, variant: Any = patch.AUTO, start_percent: Any = 0.0, end_percent: Any = 1.0, blocks: Any = "", max_error: Any = 0.0
    ) -> bool | str:
        """As the V3 node does."""
        return patch.problem(start_percent, end_percent, blocks, max_error) or True

    def execute(
        self, model: Any, variant: str = patch.AUTO, start_percent: float = 0.0, end_percent: float = 1.0, blocks: str = "",
        max_error: float = 0.0, unique_id: str = "",
    ) -> tuple[Any]:  # fmt: skip
        return (patch.apply(model, variant, start_percent, end_percent, blocks, max_error, unique_id),)


NODES = [PatchSageAttention]
