"""What a sparse node is set to: its methods with their numbers, and the checks that refuse what makes no sense.

Inputs, names and defaults of the methods that ComfyUI's *Model Sparse Attention* has are that node's, so that a workflow's numbers carry
over. A method's own inputs are named `selection.tau` and the like in prompts, whether the core nests them or not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..sageattention.variants import VARIANTS
from .schedule import Blocks, Window


class Number(NamedTuple):
    """An input of a method."""

    name: str
    default: float
    low: float
    high: float
    step: float
    tooltip: str


class Method(NamedTuple):
    """A way to choose blocks.

    Attributes:
        selection, threshold: what `sageattn_sparse` calls it and the argument that its number is; None where that is none.
        number: its input, `scale` of which is the argument.
        summary: a line for the tooltip.
    """

    selection: str
    threshold: str | None
    number: Number
    summary: str
    scale: float = 1.0


PERCENT = 0.01
KEEP = Number("keep_percent", 10.0, 0.5, 95.0, 0.5, "Percentage of the key blocks that a query computes exactly.\nLower is faster.")
METHODS = {
    "mass": Method(
        "mass", "tau",
        Number("tau", 2.0, 0.0, 16.0, 0.05, "Computes the blocks with more than tau times the mean share of the weight.\n"
               "Higher is faster: on test videos, 2 computes 6 to 11 % of the blocks, 1 11 to 17 %."),
        "adaptive, one line for all heads: the best for its time",
    ),
    "sol-attn": Method(
        "sol", "tau",
        Number("tau", 1.3, 0.0, 4.0, 0.05, "Threshold in standard deviations of the scores.\n"
               "Higher is faster: on random data, 1 computes 16 % of the blocks, 1.3 10 %."),
        "adaptive, as ComfyUI's own node has it",
    ),
    "sla": Method("topk", "keep", KEEP, "the same percentage everywhere, for LoRAs trained so", PERCENT),
    "budget": Method("topk", "keep", KEEP, "a percentage, shared out to heads by what a dense step needed", PERCENT),
    "cdf": Method(
        "cdf", "keep",
        Number("hold_percent", 70.0, 1.0, 99.5, 0.5, "Computes the largest blocks until they hold this percentage of the weight.\n"
               "Lower is faster."),
        "until a share of the weight is held, as SpargeAttn", PERCENT,
    ),
    "radial": Method(
        "static", None,
        Number("decay_factor", 1.0, 0.0, 8.0, 0.05, "Width of what a frame sees of another, which halves with their distance.\n"
               "Lower is faster."),
        "a fixed pattern, narrower the farther frames are apart",
    ),
    "vsa": Method("topk", "keep", KEEP, "for FastH3 checkpoints, which are trained for it", PERCENT),
}  # fmt: skip
DEFAULT_METHOD = "mass"

SINKS = ["exact_kv", "exact_kv_and_rows", "off"]
AUTO = "auto"
CUBES = {"4x4x4": (4, 4, 4), "2x8x4": (2, 8, 4)}
ORDERS = [AUTO, *CUBES, "frame-major"]
VARIANT_CHOICES = [AUTO, *(v.name for v in VARIANTS.values() if v.sparse_kernels)]
MAX_TOKENS = 1 << 20


class Settings(NamedTuple):
    """What one node is set to.

    Attributes:
        method: a key of `METHODS`; `value` is its number, as the node shows it.
        window, dense_blocks: steps that are sparse, and blocks of the model that are not.
        min_tokens: shorter sequences are dense.
        sinks: one of `SINKS`; order: one of `ORDERS`; variant: "auto" or a variant with block-sparse kernels.
        verbose: log each shape, not only each reason.
    """

    method: str = DEFAULT_METHOD
    value: float = METHODS[DEFAULT_METHOD].number.default
    window: Window = Window(0.2, 1.0)
    dense_blocks: Blocks = Blocks()
    min_tokens: int = 12_288
    sinks: str = "exact_kv_and_rows"
    order: str = AUTO
    variant: str = AUTO
    verbose: bool = False

    @property
    def threshold(self) -> float:
        """`value` as `sageattn_sparse` takes it."""
        return self.value * METHODS[self.method].scale

    @property
    def named(self) -> str:
        """ "mass 2", "sla 10 %"."""
        return f"{self.method} {self.value:g}" + (" %" if METHODS[self.method].scale == PERCENT else "")

    def as_inputs(self) -> dict[str, Any]:
        """As a prompt has them; `extra_tokens`, which does nothing, is not among them."""
        return {
            "selection": self.method,
            f"selection.{METHODS[self.method].number.name}": self.value,
            "start_percent": self.window.start,
            "end_percent": self.window.end,
            "dense_blocks": str(self.dense_blocks),
            "min_tokens": self.min_tokens,
            "sink_conditioning": self.sinks,
            "token_order": self.order,
            "variant": self.variant,
            "verbose": self.verbose,
        }

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Settings:
        """Settings from a node's inputs: `selection` a name with the method's inputs as "selection.tau" beside it, or both in a dict. What
        is missing or None (an input that is connected, before the workflow runs) has its default.

        Raises:
            ValueError: an input that makes no sense, with a sentence for the user.
        """
        plain = _flat(given)
        name = plain.get("selection", DEFAULT_METHOD)
        if name not in METHODS:
            raise ValueError(f"selection is {name!r}, but has to be one of {', '.join(METHODS)}.")
        number = METHODS[name].number
        window = Window(*(_number(plain, key, default, 0.0, 1.0) for key, default in (("start_percent", 0.2), ("end_percent", 1.0))))
        if window.problem():
            raise ValueError(window.problem())
        try:
            dense_blocks = Blocks.parse(str(plain.get("dense_blocks", "")))
        except ValueError as error:
            raise ValueError(f"dense_blocks: {error}") from None
        _number(plain, "extra_tokens", 0, 0, 256)
        return cls(
            name,
            _number(plain, f"selection.{number.name}", number.default, number.low, number.high),
            window,
            dense_blocks,
            int(_number(plain, "min_tokens", 12_288, 0, MAX_TOKENS)),
            _choice(plain, "sink_conditioning", "exact_kv_and_rows", SINKS),
            _choice(plain, "token_order", AUTO, ORDERS),
            str(plain.get("variant", AUTO)),
            bool(plain.get("verbose", False)),
        )


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in given.items() if value is not None}
    nested = flat.get("selection")
    if isinstance(nested, Mapping):
        inner = {f"selection.{key}": value for key, value in nested.items() if key != "selection" and value is not None}
        flat = {**flat, **inner, "selection": nested.get("selection", DEFAULT_METHOD)}
    return flat


def _number(given: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = given.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name} is {value!r}, but has to be a number from {low:g} to {high:g}.")
    return number


def _choice(given: Mapping[str, Any], name: str, default: str, choices: list[str]) -> str:
    value = given.get(name, default)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, but has to be one of {', '.join(choices)}.")
    return value
