"""`SageSparseAttention` for cores that have no `comfy_api.latest`."""

from __future__ import annotations

from typing import Any

from . import patch, sparse


class SageSparseAttention:
    """MODEL in, patched MODEL out."""

    NODE_ID = sparse.NODE_ID
    DISPLAY_NAME = sparse.DISPLAY_NAME
    CATEGORY = sparse.CATEGORY
    DESCRIPTION = sparse.DESCRIPTION
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "execute"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"model": ("MODEL", {"tooltip": patch.MODEL_TOOLTIP})},
            # A prompt that comes by the API may leave them out.
            "optional": {w.name: (w.type, {**w.options, "advanced": w.advanced}) for w in sparse.flat_widgets()},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def VALIDATE_INPUTS(
        cls, selection: Any = None, start_percent: Any = None, end_percent: Any = None, dense_blocks: Any = None, variant: Any = None
    ) -> bool | str:
        """True, or what is wrong. Any variant is accepted; inputs that are not named here ComfyUI checks itself."""
        given = {"selection": selection, "start_percent": start_percent, "end_percent": end_percent, "dense_blocks": dense_blocks}
        return sparse.problem(given) or True

    def execute(self, model: Any, unique_id: str = "", **given: Any) -> tuple[Any]:
        return (sparse.apply(model, given, unique_id),)
