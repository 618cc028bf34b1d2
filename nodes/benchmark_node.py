"""What `SageAttentionBenchmark` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch

from . import benchmark, benchmark_picture, picture, slot
from .override import Override
from .record import Entry

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE_ID = "SageAttentionBenchmark"
DISPLAY_NAME = "Sage Attention Benchmark"
DESCRIPTION = (
    "Times the attention of this very model on this machine: every variant beside PyTorch's attention and those that ComfyUI has, "
    "with their errors. Takes up to a minute."
)
MODEL_TOOLTIP = "The model. Where it was patched and sampled before,\nthe shapes of that sampling are timed."
LATENT_TOOLTIP = "Else the shapes are found by one step at this latent,\nin which attention is left out."
POSITIVE_TOOLTIP = "The conditioning of that step."
AFTER_TOOLTIP = "Anything that comes out of the sampler, to run after it.\nIt is passed on."


class _Probe(Override):
    """Answers every call by zeros, so that a step costs next to nothing, and its calls are recorded."""

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor:
        q = args[0].peek() if contained else args[0]
        hnd_out = args[7] if len(args) > 7 else kwargs.get("skip_output_reshape", False)
        if entry.hnd:
            return torch.zeros_like(q) if hnd_out else q.new_zeros(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])
        heads = entry.heads or 1
        return q.new_zeros(q.shape[0], heads, q.shape[1], q.shape[2] // heads) if hnd_out else torch.zeros_like(q)

    def settings(self) -> dict[str, Any]:
        return {}


def run(model: ModelPatcher, latent: dict[str, Any] | None, positive: Any) -> tuple[torch.Tensor, str, str, dict[str, Any]]:
    """Picture [1, height, 1024, 3] fp32, text, JSON, and what the node shows.

    Raises:
        ValueError: nothing tells the model's shapes.
    """
    import comfy.model_management as management
    import comfy.utils

    record = slot.record_of(model)
    given = benchmark.cases(record.entries if record else ())
    if not given:
        given = benchmark.cases(_probe(model, latent, positive))
    device = model.load_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    bar: list[Any] = []
    timing = benchmark.Benchmark(
        device,
        tick=lambda: bar[0].update(1),
        pause=management.throw_exception_if_processing_interrupted,
        make_room=lambda size: management.free_memory(size, device),
    )
    bar.append(comfy.utils.ProgressBar(timing.ticks(given)))
    rows = timing.run(given)
    drawn = benchmark_picture.draw(name, rows)
    as_json = json.dumps(benchmark.as_dict(name, rows), indent=2)
    return picture.tensor(drawn), benchmark.text(name, rows), as_json, picture.preview(drawn)


def _probe(model: ModelPatcher, latent: dict[str, Any] | None, positive: Any) -> list[Entry]:
    """The calls of one step."""
    if latent is None or positive is None:
        raise ValueError(
            "Nothing tells which attention this model needs: connect a latent and a positive conditioning, "
            "or put this node behind the sampler of a model that Patch Sage Attention has patched."
        )
    import comfy.sample

    probed = slot.install(slot.bare(model), _Probe())
    samples = latent["samples"]
    if hasattr(comfy.sample, "fix_empty_latent_channels"):
        samples = comfy.sample.fix_empty_latent_channels(probed, samples)
    noise = comfy.sample.prepare_noise(samples, 0)
    comfy.sample.sample(probed, noise, 1, 1.0, "euler", "simple", positive, positive, samples, disable_pbar=True)
    record = slot.record_of(probed)
    assert record is not None, "installed above"
    if not record.entries:
        raise ValueError("The model never calls ComfyUI's attention: it has one of its own, which no variant can take the place of.")
    return record.entries
