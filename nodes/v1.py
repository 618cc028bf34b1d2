"""The nodes for cores that have no `comfy_api.latest`."""

from __future__ import annotations

from typing import Any

from . import benchmark_node, patch, report_node
from .v1_sparse import SageSparseAttention


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


class _Shown:
    """A node that shows something: IMAGE, text, JSON, and what was passed in, out."""

    CATEGORY = patch.CATEGORY
    RETURN_TYPES = ("IMAGE", "STRING", "STRING", "*")
    RETURN_NAMES = report_node.OUTPUT_NAMES
    FUNCTION = "execute"
    OUTPUT_NODE = True


class SageAttentionReport(_Shown):
    """MODEL in."""

    NODE_ID = report_node.NODE_ID
    DISPLAY_NAME = report_node.DISPLAY_NAME
    DESCRIPTION = report_node.DESCRIPTION

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": report_node.MODEL_TOOLTIP})},
            "optional": {"after": ("*", {"tooltip": report_node.AFTER_TOOLTIP})},
        }

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        """Never what it was: what a model did is none of its inputs."""
        return float("nan")

    def execute(self, model: Any, after: Any = None) -> dict[str, Any]:
        *outputs, shown = report_node.run(model)
        return {"ui": shown, "result": (*outputs, after)}


class SageAttentionBenchmark(_Shown):
    """MODEL in."""

    NODE_ID = benchmark_node.NODE_ID
    DISPLAY_NAME = benchmark_node.DISPLAY_NAME
    DESCRIPTION = benchmark_node.DESCRIPTION

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": benchmark_node.MODEL_TOOLTIP})},
            "optional": {
                "latent": ("LATENT", {"tooltip": benchmark_node.LATENT_TOOLTIP}),
                "positive": ("CONDITIONING", {"tooltip": benchmark_node.POSITIVE_TOOLTIP}),
                "after": ("*", {"tooltip": benchmark_node.AFTER_TOOLTIP}),
            },
        }

    def execute(self, model: Any, latent: Any = None, positive: Any = None, after: Any = None) -> dict[str, Any]:
        *outputs, shown = benchmark_node.run(model, latent, positive)
        return {"ui": shown, "result": (*outputs, after)}


NODES: list[Any] = [PatchSageAttention, SageSparseAttention, SageAttentionReport, SageAttentionBenchmark]
