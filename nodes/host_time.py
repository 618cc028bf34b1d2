"""What an attention call costs the host, which counts where calls are short.

A fast card waits for the next launch in a model of many short calls, such as SDXL: then it is the host's time that makes a step long, and
there the core's own function is the slower one, because it sets the order of PyTorch's backends at each call. Where another model keeps the
card busy, the device's time is what counts. Nobody knows beforehand which of the two it is, so a call is taken to cost half of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sageattention.variants import SDPA, Candidate

if TYPE_CHECKING:
    from ..sageattention.planning.plan import Plan

# Milliseconds of the host for a call that goes on to the core's function, and for one that our launches compute, between the layers of a
# model, where the code of neither is in a cache (docs/auto.md).
CORE, OURS = 0.081, 0.050
BASES = ("measured", "calibrated", "verified")  # a data sheet is no good for differences of a few microseconds


def shorter(plan: Plan) -> Candidate | None:
    """What computes a call that "auto" leaves to PyTorch's attention sooner, where the host's time counts too; None where nothing does."""
    predicted = dict(plan.predicted)
    own = predicted.pop(Candidate(SDPA.name), None)
    if own is None or plan.variant is not SDPA or plan.basis not in BASES:
        return None
    refused = {candidate for candidate, _ in plan.rejected}
    able = {candidate: ms for candidate, ms in predicted.items() if candidate not in refused}
    best = min(able, key=able.__getitem__, default=None)
    return best if best is not None and _cost(able[best], OURS) < _cost(own, CORE) else None


def _cost(device_ms: float, host_ms: float) -> float:
    """Twice the mean of what a call costs a model that is bound by the host, and one that is bound by the device."""
    return max(device_ms, host_ms) + device_ms
