"""The nodes for ComfyUI's current API (core 0.3.48 and newer)."""

from __future__ import annotations

from comfy_api.latest import io

from . import patch


class PatchSageAttention(io.ComfyNode):
    """MODEL in, patched MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=patch.NODE_ID,
            display_name=patch.DISPLAY_NAME,
            category=patch.CATEGORY,
            description=patch.description(),
            inputs=[
                io.Model.Input("model", tooltip=patch.MODEL_TOOLTIP),
                # A prompt that comes by the API may leave it out.
                io.Combo.Input("variant", options=patch.CHOICES, default=patch.AUTO, tooltip=patch.variant_tooltip(), optional=True),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, variant: str = patch.AUTO) -> bool:
        """Accept any variant: a workflow saved elsewhere still loads, and `patch.usable` finds a replacement, aloud."""
        return True

    @classmethod
    def execute(cls, model, variant: str = patch.AUTO) -> io.NodeOutput:
        return io.NodeOutput(patch.apply(model, variant))


NODES = [PatchSageAttention]
