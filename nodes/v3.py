"""The nodes for ComfyUI's current API (core 0.3.48 and newer)."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import benchmark_node, patch, report_node
from .v3_sparse import SageSparseAttention


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
                # A prompt that comes by the API may leave them out, and one saved by an earlier version does.
                io.Combo.Input("variant", options=patch.CHOICES, default=patch.AUTO, tooltip=patch.variant_tooltip(), optional=True),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, tooltip=patch.START_TOOLTIP, optional=True),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=patch.END_TOOLTIP, optional=True),
                io.String.Input("blocks", default="", tooltip=patch.BLOCKS_TOOLTIP, optional=True),
                io.Float.Input("max_error", default=0.0, min=0.0, max=1.0, step=0.001, tooltip=patch.MAX_ERROR_TOOLTIP, optional=True),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, variant=patch.AUTO, start_percent=0.0, end_percent=1.0, blocks="", max_error=0.0
    ) -> bool | str:  # fmt: skip
        """Accept any variant: a workflow saved elsewhere still loads, and `patch.usable` finds a replacement, aloud."""
        return patch.problem(start_percent, end_percent, blocks, max_error) or True

    @classmethod
    def execute(
        cls, model, variant: str = patch.AUTO, start_percent: float = 0.0, end_percent: float = 1.0, blocks: str = "",
        max_error: float = 0.0,
    ) -> io.NodeOutput:  # fmt: skip
        node_id = cls.hidden.unique_id if cls.hidden else ""
        return io.NodeOutput(patch.apply(model, variant, start_percent, end_percent, blocks, max_error, node_id))


def _outputs() -> list[Any]:
    """Of a node that shows something: IMAGE, text, JSON, and what was passed in."""
    kinds = (io.Image, io.String, io.String, io.AnyType)
    return [kind.Output(display_name=name) for kind, name in zip(kinds, report_node.OUTPUT_NAMES)]


class SageAttentionReport(io.ComfyNode):
    """MODEL in; IMAGE, text, JSON, and what was passed in, out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=report_node.NODE_ID,
            display_name=report_node.DISPLAY_NAME,
            category=patch.CATEGORY,
            description=report_node.DESCRIPTION,
            inputs=[
                io.Model.Input("model", tooltip=report_node.MODEL_TOOLTIP),
                io.AnyType.Input("after", tooltip=report_node.AFTER_TOOLTIP, optional=True),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        """Never what it was: what a model did is none of its inputs."""
        return float("nan")

    @classmethod
    def execute(cls, model, after=None) -> io.NodeOutput:
        *outputs, shown = report_node.run(model)
        return io.NodeOutput(*outputs, after, ui=shown)


class SageAttentionBenchmark(io.ComfyNode):
    """MODEL in; IMAGE, text, JSON, and what was passed in, out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=benchmark_node.NODE_ID,
            display_name=benchmark_node.DISPLAY_NAME,
            category=patch.CATEGORY,
            description=benchmark_node.DESCRIPTION,
            inputs=[
                io.Model.Input("model", tooltip=benchmark_node.MODEL_TOOLTIP),
                io.Latent.Input("latent", tooltip=benchmark_node.LATENT_TOOLTIP, optional=True),
                io.Conditioning.Input("positive", tooltip=benchmark_node.POSITIVE_TOOLTIP, optional=True),
                io.AnyType.Input("after", tooltip=benchmark_node.AFTER_TOOLTIP, optional=True),
            ],
            outputs=_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, latent=None, positive=None, after=None) -> io.NodeOutput:
        *outputs, shown = benchmark_node.run(model, latent, positive)
        return io.NodeOutput(*outputs, after, ui=shown)


NODES: list[Any] = [PatchSageAttention, SageSparseAttention, SageAttentionReport, SageAttentionBenchmark]
