"""Where a call stands: the sampling, the step and the layer, as far as ComfyUI tells.

A step is one evaluation of the model at one sigma; samplers of second order evaluate it twice where they show one. ComfyUI hands the
same tensor `transformer_options["sigmas"]` to every call of a step, and the same list `["cond_or_uncond"]` to every call of one pass
through the network, so both are told apart by identity, without a look at what is on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

CPU = "cpu"  # the key of calls that tell no sigma


class Step:
    """One step.

    Attributes:
        number: from 0.
        sigmas: ComfyUI's tensor, None where it gives none.
        pass_: ComfyUI's list of the current pass through the network; kept alive, so that its identity is nobody else's.
        calls: attention calls of that pass so far.
        begun, timed: for the record: whether it has seen a call, and whether it times them.
    """

    __slots__ = ("_sigma", "begun", "calls", "number", "pass_", "sigmas", "timed")

    def __init__(self, number: int, sigmas: torch.Tensor | None):
        self.number, self.calls = number, 0
        self.begun = self.timed = False
        self.pass_: object = None
        self.sigmas = sigmas
        self._sigma: float | None = None

    @property
    def sigma(self) -> float | None:
        """The step's sigma, None where ComfyUI does not tell. Waits for the device, the first time."""
        if self._sigma is None and self.sigmas is not None and self.sigmas.numel():
            self._sigma = float(self.sigmas.max())
        return self._sigma


class Layer(NamedTuple):
    """Which layer of a model a call comes from.

    Attributes:
        name: "double block 7", "input block 4.0"; "call 12" where the model does not tell.
        block: the number of the block, None where the model does not tell; U-Nets count their modules with attention.
    """

    name: str
    block: int | None


class Sampling:
    """One run of a sampler.

    Attributes:
        percent_to_sigma: of the model that is sampled; None outside of a sampling.
        current: the last call's step.
    """

    def __init__(self, percent_to_sigma: Callable[[float], float] | None = None):
        self.percent_to_sigma = percent_to_sigma
        self._sigmas_at: dict[float, float] = {}
        self._steps: dict[Any, Step] = {}  # device → its current step: several devices may share the work
        self.current: Step | None = None
        self._layers: dict[tuple[Any, ...], Layer] = {}

    def sigma_at(self, percent: float) -> float:
        """The sigma at a percentage of this sampling, as a number."""
        sigma = self._sigmas_at.get(percent)
        if sigma is None:
            assert self.percent_to_sigma is not None, "asked for a sigma outside of a sampling"
            sigma = self._sigmas_at[percent] = float(self.percent_to_sigma(percent))
        return sigma

    @property
    def steps(self) -> int:
        """Steps begun so far."""
        return max((step.number + 1 for step in self._steps.values()), default=0)

    def step(self, options: dict[str, Any]) -> Step:
        """The step of a call that comes with these `transformer_options`."""
        sigmas = options.get("sigmas")
        step = self.current
        if step is None or step.sigmas is not sigmas:
            device = CPU if sigmas is None else sigmas.device
            step = self._steps.get(device)
            if step is None or step.sigmas is not sigmas:
                step = self._steps[device] = Step(0 if step is None else step.number + 1, sigmas)
            self.current = step
        return step

    def layer(self, options: dict[str, Any], step: Step) -> Layer:
        """The layer of the next call of a step."""
        pass_ = options.get("cond_or_uncond")
        if step.pass_ is not pass_:
            step.pass_, step.calls = pass_, 0
        number, step.calls = step.calls, step.calls + 1
        return self.named(
            number, options.get("block"), options.get("block_type"), options.get("block_index"), options.get("transformer_index")
        )

    def named(self, number: int, *told: Any) -> Layer:
        """The layer of a pass's call of that number; `told`: what its options say under the four names that `layer` reads."""
        try:
            known = self._layers.get(told)
            if known is None:
                known = self._layers[told] = _layer(*told)
        except TypeError:  # other packs' own notions, without a hash
            known = _layer(*told)
        return known if known.name else Layer(f"call {number}", known.block)


def layer_name(options: dict[str, Any] | None) -> str:
    """Where in the model a call comes from, as far as its options tell: "input block 4.0", "double block 7", "block 3", ""."""
    options = options if isinstance(options, dict) else {}
    return _layer(options.get("block"), options.get("block_type"), options.get("block_index"), None).name


def _layer(block: Any, kind: Any, index: Any, module: Any) -> Layer:
    """Its name is "" where the model does not tell."""
    if isinstance(block, (tuple, list)) and len(block) >= 2:  # U-Nets: ("input", 4), and the index of the transformer block inside
        name = f"{block[0]} block {block[1]}" + (f".{index}" if index is not None else "")
        return Layer(name, module if isinstance(module, int) else None)
    if index is None:
        return Layer("", None)
    return Layer(f"{kind or ''} block {index}".lstrip(), index if isinstance(index, int) else None)
