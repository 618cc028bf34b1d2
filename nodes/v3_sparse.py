"""`SageSparseAttention` for ComfyUI's current API: with nested inputs where the core has them (2026), else with all of them beside each
other. Prompts of both have the same names."""

from __future__ import annotations

import inspect
from typing import Any

from comfy_api.latest import io

from . import patch, sparse
from .sparse_settings import METHODS

_KINDS = {"FLOAT": io.Float, "INT": io.Int, "STRING": io.String, "BOOLEAN": io.Boolean}
_FOLDS = "advanced" in inspect.signature(io.Float.Input).parameters


def _input(widget: sparse.Widget) -> Any:
    options = {**widget.options, "optional": True}  # a prompt that comes by the API may leave it out
    if _FOLDS:
        options["advanced"] = widget.advanced
    if isinstance(widget.type, list):
        return io.Combo.Input(widget.name, options=widget.type, **options)
    return _KINDS[widget.type].Input(widget.name, **options)


def _inputs() -> list[Any]:
    if not hasattr(io, "DynamicCombo"):
        return [_input(widget) for widget in sparse.flat_widgets()]
    methods = [
        io.DynamicCombo.Option(name, [_input(sparse.number_widget(method.number, method.number.name))]) for name, method in METHODS.items()
    ]
    return [
        io.DynamicCombo.Input("selection", options=methods, tooltip=sparse.SELECTION_TOOLTIP),
        *(_input(widget) for widget in sparse.WIDGETS),
    ]


class SageSparseAttention(io.ComfyNode):
    """MODEL in, patched MODEL out."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=sparse.NODE_ID,
            display_name=sparse.DISPLAY_NAME,
            category=sparse.CATEGORY,
            description=sparse.DESCRIPTION,
            inputs=[io.Model.Input("model", tooltip=patch.MODEL_TOOLTIP), *_inputs()],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, selection: Any = None, start_percent: Any = None, end_percent: Any = None, dense_blocks: Any = None, variant: Any = None
    ) -> bool | str:
        """True, or what is wrong. Any variant is accepted; inputs that are not named here ComfyUI checks itself."""
        given = {"selection": selection, "start_percent": start_percent, "end_percent": end_percent, "dense_blocks": dense_blocks}
        return sparse.problem(given) or True

    @classmethod
    def execute(cls, model: Any, **given: Any) -> io.NodeOutput:
        return io.NodeOutput(sparse.apply(model, given, cls.hidden.unique_id if cls.hidden else ""))
