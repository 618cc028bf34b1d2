"""What `SageSparseAttention` offers and does, for either generation of ComfyUI's node API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from . import forward, patch, slot, vsa
from .record import LOG
from .sparse_override import NODE, SparseOverride
from .sparse_settings import AUTO, DEFAULT_METHOD, MAX_TOKENS, METHODS, ORDERS, SINKS, VARIANT_CHOICES, Number, Settings

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

NODE_ID = NODE
DISPLAY_NAME = "Patch Sage Sparse Attention"
CATEGORY = patch.CATEGORY
DESCRIPTION = (
    "Makes long videos faster: computes exactly the blocks of the attention that matter, and sums up the rest by their means. Works from "
    "RTX 20xx on. Short sequences, the first steps and what a sparse kernel can't do run on the model's own attention, or on Patch Sage "
    "Attention, which may stand before or after this node."
)

SELECTION_TOOLTIP = "How the blocks are chosen that are computed exactly.\n" + "\n".join(
    f"{name}: {method.summary}." for name, method in METHODS.items() if name not in ("sol-attn", "cdf", "radial")
)


class Widget(NamedTuple):
    """An input of the node.

    Attributes:
        type: "FLOAT", "INT", "STRING", "BOOLEAN" or a list of choices.
        options: as ComfyUI has them.
        advanced: folded away where the front end can.
    """

    name: str
    type: str | list[str]
    options: dict[str, Any]
    advanced: bool = True


def number_widget(number: Number, name: str) -> Widget:
    """The widget of a method's number."""
    limits = {"display_name": number.name, "default": number.default, "min": number.low, "max": number.high, "step": number.step}
    return Widget(name, "FLOAT", {**limits, "tooltip": number.tooltip}, advanced=False)


WIDGETS = (
    Widget("start_percent", "FLOAT", {
        "default": 0.2, "min": 0.0, "max": 1.0, "step": 0.01,
        "tooltip": "Where in the sampling it begins. The steps before are dense:\nthey decide the composition.",
    }, advanced=False),
    Widget("end_percent", "FLOAT", {
        "default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": "Where in the sampling it ends. The steps after are dense.",
    }, advanced=False),
    Widget("dense_blocks", "STRING", {
        "default": "",
        "tooltip": "Blocks of the model that stay dense: numbers and ranges,\nsuch as 0, 1, 47-49. For models that report their blocks.",
    }),
    Widget("min_tokens", "INT", {
        "default": 12_288, "min": 0, "max": MAX_TOKENS, "step": 512, "tooltip": "Shorter sequences stay dense.",
    }),
    Widget("extra_tokens", "INT", {
        "default": 256, "min": 0, "max": 256, "step": 64,
        "tooltip": "Does nothing here. It is accepted so that the numbers of\nComfyUI's Model Sparse Attention carry over.",
    }),
    Widget("sink_conditioning", SINKS, {
        "default": "exact_kv_and_rows", "display_name": "sinks",  # the whole name does not fit beside its values
        "tooltip": "exact_kv: all see text, references and audio exactly.\nexact_kv_and_rows: these see everything exactly, too.\n"
                   "off: they are blocks like all others.",
    }),
    Widget("verbose", "BOOLEAN", {"default": False, "tooltip": "Log each shape that is sparse, not only what is dense and why."}),
    Widget("token_order", ORDERS, {
        "default": AUTO,
        "tooltip": "The tokens that make a block. auto: small volumes of the\nvideo (frames x rows x columns), with down to half the\n"
                   "error of frame-major; frame-major where the grid is not\nknown.",
    }),
    Widget("variant", VARIANT_CHOICES, {
        "default": AUTO,
        "tooltip": "The kernels: auto, or by type of V: FP16 (most accurate),\nFP8 (RTX 40xx and newer, H100), INT8 (GeForce).",
    }),
)  # fmt: skip


def flat_widgets() -> list[Widget]:
    """All inputs but the model, for cores without nested ones. What a core with nested inputs shows beside "mass" comes first and in its
    order, so that a saved workflow of either fits the other."""
    numbers: dict[str, dict[str, Number]] = {}  # name → method → number
    for key, method in METHODS.items():
        numbers.setdefault(method.number.name, {})[key] = method.number
    widgets = {name: _shared_widget(name, users) for name, users in numbers.items()}
    first = widgets.pop(METHODS[DEFAULT_METHOD].number.name)
    selection = Widget("selection", list(METHODS), {"default": DEFAULT_METHOD, "tooltip": SELECTION_TOOLTIP}, advanced=False)
    return [selection, first, *WIDGETS, *widgets.values()]


def _shared_widget(name: str, users: dict[str, Number]) -> Widget:
    """One widget for the numbers of several methods: the default is the first one's, and the tooltip says what it is for each."""
    known = next(iter(users.values()))
    low, high = min(number.low for number in users.values()), max(number.high for number in users.values())
    by_text: dict[str, list[str]] = {}
    for key, number in users.items():
        by_text.setdefault(number.tooltip, []).append(key)
    tooltip = "\n".join(f"{', '.join(keys)}: {text}" for text, keys in by_text.items())
    return number_widget(known._replace(low=low, high=high, tooltip=tooltip), f"selection.{name}")


def problem(given: Mapping[str, Any]) -> str:
    """What is wrong with the node's inputs, in a sentence for the user; "" where nothing is."""
    try:
        Settings.parse(given)
    except ValueError as error:
        return str(error)
    return ""


def apply(model: ModelPatcher, given: Mapping[str, Any], node_id: str = "") -> ModelPatcher:
    """A clone of `model` whose long self attention is sparse.

    Args:
        given: the node's other inputs, see `Settings.parse`.
        node_id: of the node, which shows a line while it samples; "" for none.

    Raises:
        ValueError: an input makes no sense, or the method is not for this model, with a sentence for the user.
    """
    settings = Settings.parse(given)
    if given.get("selection") is None:  # cores with nested inputs drop a name that they do not know
        LOG.warning("%s: selection is missing, or unknown to this version: %s is used", NODE_ID, settings.named)
    settings = settings._replace(variant=patch.usable(settings.variant, model.load_device))
    override = SparseOverride(settings)
    override.node_id = node_id or ""
    patched = slot.install(model, override)
    forward.announce(patched)
    if settings.method == "vsa":
        vsa.bring_gates(patched)
    return patched
