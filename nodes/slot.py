"""The one place in a ComfyUI model where an attention override lives, and who owns it.

ComfyUI looks up `transformer_options["optimized_attention_override"]` at every attention call. There is one slot and the
last writer wins, so whoever writes it has to remember, and chain to, what was there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from . import progress, record, sampler
from .override import Override
from .record import Record

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KEY = "optimized_attention_override"


def owner(model: ModelPatcher) -> Callable[..., Any] | None:
    """What is in the model's slot: our override, somebody else's, or None."""
    return _options(model).get(KEY)


def record_of(model: ModelPatcher) -> Record | None:
    """What happened in a model that we patched; None in any other."""
    return _options(model).get(record.KEY)


def ours(override: Callable[..., Any] | None) -> Iterator[Override]:
    """Our overrides from the front on, up to the first of somebody else."""
    while isinstance(override, Override):
        yield override
        override = override.previous


def install(model: ModelPatcher, override: Override) -> ModelPatcher:
    """A clone of `model` with `override`: one of ours of the same kind is replaced, all others are chained to."""
    patched = model.clone()
    _place(patched, type(override), override)
    return patched


def bare(model: ModelPatcher) -> ModelPatcher:
    """A clone of `model` without any override, whosever."""
    clone = model.clone()
    _options(clone).pop(KEY, None)
    return clone


def remove(model: ModelPatcher, kind: type[Override]) -> ModelPatcher:
    """A clone of `model` without our override of a kind: the slot holds again what we had chained to. Other overrides stay."""
    restored = model.clone()
    _place(restored, kind, None)
    return restored


def _place(model: ModelPatcher, kind: type[Override], override: Override | None) -> None:
    """Put `override` in the place of ours of a kind, in a clone."""
    options = _options(model)
    chain = list(ours(options.get(KEY)))
    behind = chain[-1].previous if chain else options.get(KEY)
    if override is None and not any(type(one) is kind for one in chain):
        return
    chain = [one for one in chain if type(one) is not kind] + ([] if override is None else [override])
    new = Record()  # of its own: the model that it is a clone of may be sampled, too
    for one in sorted(chain, key=lambda one: one.RANK):
        behind = one.in_front_of(behind, new)
    if behind is None:
        options.pop(KEY, None)
    else:
        options[KEY] = behind
    options.pop(record.KEY, None)
    sampler.unwatch(model)
    if chain:
        options[record.KEY] = new
        new.on_step = progress.line([one.node_id for one in chain])
        sampler.watch(model, any(one.tests_output for one in chain))


def _options(model: ModelPatcher) -> dict[str, Any]:
    return model.model_options.setdefault("transformer_options", {})
