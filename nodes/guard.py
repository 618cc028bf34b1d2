"""The guard: it measures what quantising does to each layer, and takes a safer variant where that is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sageattention import KernelMissing, Unsupported, available_variants, prepare
from ..sageattention.variants import CUDA_FP16, TRITON_FP16, VARIANTS
from .exactness import of_call

if TYPE_CHECKING:
    import torch

    from ..sageattention.dispatch import Call
    from .record import Entry
    from .sampling import Sampling

OFF = "the guard found every variant's error above max_error"
NOT_ALL_OFF = "the guard found its error above max_error"

# A layer is looked at when it is first seen, and again in one step of EVERY: a third of the layers in each of the steps LOOKS_AGAIN, so
# that no step takes much longer than the others.
LOOKS_AGAIN, EVERY = (6, 10, 14), 24


@dataclass
class Choice:
    """What the guard chose for a layer and a kind of call.

    Attributes:
        variant: a variant's name; "" for the attention behind ours.
        error: of that variant, or of the last one that was tried.
        turn: which of the steps it is looked at again.
        looked: the step at which it was last looked at.
    """

    variant: str
    error: float
    turn: int
    looked: int


class Guard:
    """Watches over the errors of one patched model.

    Attributes:
        max_error: the relative L2 error, above 0, that the worst head of a call may have.
    """

    def __init__(self, max_error: float):
        self.max_error = max_error
        self._sampling: Sampling | None = None
        self._choices: dict[Any, Choice] = {}  # by layer and problem, of one sampling: weights and inputs of the next may be others
        self._safer: dict[torch.device, str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it looks at everything anew."""
        return Guard, (self.max_error,)

    def run(self, entry: Entry, call: Call, release: Callable[[], object] | None) -> torch.Tensor | None:
        """The call by the fastest variant whose error is within bounds; None where there is none, and the attention behind has to do it.

        Raises:
            KernelMissing: of a variant that was asked for by name.
        """
        if entry.sampling is not self._sampling:
            self._sampling, self._choices = entry.sampling, {}
        key, step = (entry.layer.name, call.problem), entry.step.number
        choice = self._choices.get(key)
        if choice is None:
            choice = Choice("", 0.0, len(self._choices) % len(LOOKS_AGAIN), step)
            out = self._look(entry, call, choice)
            self._choices[key] = choice
            return out
        if not choice.variant:
            self._leave(entry, choice)
            return None
        if call.plan.variant.name != choice.variant:
            planned, call = call, _by(choice.variant, call)
            del planned.q, planned.k, planned.v  # so that this one can be the last that has them
        if step % EVERY == LOOKS_AGAIN[choice.turn] and choice.looked != step:
            choice.looked = step
            return self._look(entry, call, choice)
        result = call.attempt(release)
        if result is None:
            entry.kept(call.left_to_model)
            return None
        entry.computed(call)
        return result[0]

    def _look(self, entry: Entry, call: Call, choice: Choice) -> torch.Tensor | None:
        """Compute the call by its own variant, then by safer ones, until one is good enough; remember which."""
        for candidate in self._candidates(call):
            try:
                result = candidate.attempt()
            except KernelMissing:
                if candidate is call:
                    raise
                continue
            if result is None:  # its kernel was found missing just now
                continue
            variant = candidate.plan.variant.name
            choice.error = entry.error = of_call(result[0], candidate)
            if choice.error <= self.max_error:
                choice.variant = variant
                entry.computed(candidate)
                return result[0]
            del result  # before the next one's output is allocated
            entry.pass_on(f"{variant}: {NOT_ALL_OFF}")
        choice.variant = ""
        self._leave(entry, choice)
        return None

    def _leave(self, entry: Entry, choice: Choice) -> None:
        entry.error, entry.exact = choice.error, True
        entry.kept(OFF)

    def _candidates(self, call: Call) -> Iterator[Call]:
        """The call as planned, then by the variant with the smallest error, where there is one more. What is between them is no way out:
        most of the error is either that of P and V in FP8, or that of Q and K, which all have in common."""
        scheme = call.plan.variant.scheme
        yield call
        if scheme is None or scheme.pv != "fp16":
            safest = self._safest(call.q.device)
            if safest:
                try:
                    candidate = _by(safest, call)
                except (Unsupported, KernelMissing):  # then there is none
                    return
                yield candidate

    def _safest(self, device: torch.device) -> str:
        known = self._safer.get(device)
        if known is None:
            ready = {a.name for a in available_variants(device) if a.status == "ready"}
            known = self._safer[device] = next((v.name for v in (CUDA_FP16, TRITON_FP16) if v.name in ready), "")
        return known


def _by(variant: str, call: Call) -> Call:
    """The same call by another variant."""
    assert variant in VARIANTS
    return prepare(call.q, call.k, call.v, call.problem.layout, sm_scale=call.problem.sm_scale, attn_mask=call.mask, variant=variant)
