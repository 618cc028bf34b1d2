"""Why a patch did not do what its user expects: sentences for the report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from . import slot
from .override import SAGE, Override

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def of_model(model: ModelPatcher) -> list[str]:
    """What a user should know about this model's attention; nothing where all is as one would expect."""
    return [*_slot(model), *_sampling(model), *_flag(model), *_preferred(model)]


def name(function: Callable[..., Any]) -> str:
    """A function's name and whose it is, as far as it tells."""
    kind = function if hasattr(function, "__qualname__") else type(function)
    module = str(getattr(kind, "__module__", "")).replace("\\", "/").rsplit("custom_nodes/", 1)[-1]
    return f"{getattr(kind, '__qualname__', kind)} of {module}"


def _slot(model: ModelPatcher) -> list[str]:
    owner, record = slot.owner(model), slot.record_of(model)
    if isinstance(owner, Override):
        behind = list(slot.ours(owner))[-1].previous
        return [] if behind is None else [f"What our nodes leave goes to another pack's attention patch, {name(behind)}."]
    if record is None:
        taken = f" {name(owner)} is its attention patch." if owner is not None else ""
        return [f"No node of ours has patched this model.{taken}"]
    if owner is None:
        return ["Our patch is gone: another node has emptied the model's place for attention patches after ours."]
    calls = "it still calls ours" if record.entries else "it has not called ours: put our node behind its node"
    return [f"Another pack's attention patch, {name(owner)}, stands in front of ours; {calls}."]


def _sampling(model: ModelPatcher) -> list[str]:
    record = slot.record_of(model)
    if record is None:
        return []
    said = list(record.notes)
    if not record.begun:
        said.append(
            "This model has not been sampled since it was patched: connect the very one that goes to the sampler, "
            "and something that comes out of the sampler."
        )
    elif not record.entries and isinstance(slot.owner(model), Override):
        said.append(
            "The model was sampled and never called ComfyUI's attention: it has one of its own, as Nunchaku's models have, "
            "or passes no transformer_options to it. No patch reaches it; the start flag --use-sage-attention may."
        )
    elif record.entries and not any(entry.variant for entry in record.entries):
        said.append("Nothing ran on our kernels; the reasons are listed below.")
    return said


def _flag(model: ModelPatcher) -> list[str]:
    attention = sys.modules.get("comfy.ldm.modules.attention")
    own = getattr(getattr(attention, "optimized_attention", None), "__name__", "")
    if own not in SAGE:
        return []
    if slot.record_of(model) is None:
        return ["The start flag is set: all models run on sageattention, this one too."]
    return ["The start flag is set: what our nodes leave to the model's own attention runs on sageattention all the same."]


def _preferred(model: ModelPatcher) -> list[str]:
    """Layers of a checkpoint may name their attention; ComfyUI asks a patch first."""
    modules: Iterable[Any] = getattr(model.model, "modules", list)()
    wanted = {module.config.get("attention") for module in modules if isinstance(getattr(module, "config", None), dict)}
    methods = ", ".join(sorted(method for method in wanted if isinstance(method, str)))
    if not methods:
        return []
    if slot.owner(model) is None:
        return [f"The checkpoint asks for its own attention, {methods}, and gets it."]
    return [f"The checkpoint asks for its own attention, {methods}; the patch takes its place in all layers."]
