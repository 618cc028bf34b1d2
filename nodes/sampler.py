"""What a patched model's record sees of ComfyUI's sampler: where a sampling begins and ends, and whether a step's output is finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from . import record
from .override import SUSPENDED

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

OWNER = "sageattention"
OUTER_SAMPLE, CALC_COND_BATCH = "outer_sample", "calc_cond_batch"  # of comfy.patcher_extension.WrappersMP

OUTPUT_BAD = "a step gave values that are not finite, and ran again on the model's own attention"
OUTPUT_STILL_BAD = "a step gives values that are not finite with the model's own attention, too: the cause is elsewhere"


def watch(model: ModelPatcher, test_output: bool) -> None:
    """Let the model's record see its samplings.

    Args:
        test_output: run a step whose output is not finite again on the model's own attention.
    """
    model.add_wrapper_with_key(OUTER_SAMPLE, OWNER, _sample)
    if test_output:
        model.add_wrapper_with_key(CALC_COND_BATCH, OWNER, _step)


def unwatch(model: ModelPatcher) -> None:
    """Take that back."""
    for kind in (OUTER_SAMPLE, CALC_COND_BATCH):
        model.remove_wrappers_with_key(kind, OWNER)


def _sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a whole sampling."""
    guider = executor.class_obj
    here = guider.model_options["transformer_options"].get(record.KEY)
    if here is None:  # somebody has made new options of a part of ours
        return executor(*args, **kwargs)
    here.begin(lambda percent: guider.model_patcher.get_model_object("model_sampling").percent_to_sigma(percent))
    try:
        return executor(*args, **kwargs)
    finally:
        here.end()


def _step(executor: Any, model: Any, conds: Any, x: Any, timestep: Any, model_options: dict[str, Any]) -> Any:
    """Around one step: all passes through the network that it takes."""
    out = executor(model, conds, x, timestep, model_options)
    options = model_options.get("transformer_options", {})
    here = options.get(record.KEY)
    if here is None or OUTPUT_STILL_BAD in here.notes or _finite(out) or not _finite([x]):
        return out
    here.note(OUTPUT_BAD)
    again = executor(model, conds, x, timestep, {**model_options, "transformer_options": {**options, SUSPENDED: True}})
    if not _finite(again):
        here.note(OUTPUT_STILL_BAD)
    return again


def _finite(tensors: Any) -> bool:
    """Waits for the device, once."""
    return bool(torch.stack([t.isfinite().all() for t in tensors]).all())
