"""What `SageAttentionReport` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..sageattention.cli import report as printed
from . import picture, report, report_picture

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher

NODE_ID = "SageAttentionReport"
DISPLAY_NAME = "Sage Attention Report"
DESCRIPTION = (
    "Shows what this model's attention did in its last sampling: which variant ran in which layer and step, how long it took, "
    "how far off it was where the guard measured, and why the rest was left. Says when the patch had no effect."
)
MODEL_TOOLTIP = "The patched model, the same that goes to the sampler."
AFTER_TOOLTIP = "Anything that comes out of the sampler, such as its\nlatent: the report then runs after it. It is passed on."
OUTPUT_NAMES = ("image", "text", "json", "after")


def run(model: ModelPatcher) -> tuple[torch.Tensor, str, str, dict[str, Any]]:
    """The report on a model: picture [1, height, 1024, 3] fp32, text, JSON, and what the node shows."""
    data = report.of_model(model)
    report.save(data)
    drawn = report_picture.draw(data)
    return picture.tensor(drawn), printed.text(data), json.dumps(data, indent=2), picture.preview(drawn)
