"""Parameters of torch's and flash-attention's functions that programs pass to ours by name.

Some rename a parameter of ours: `scale` and `softmax_scale` are `sm_scale`, `causal` is `is_causal`. The others (`NEUTRAL`) ask for a
feature; only the values that ask for nothing are accepted. Both are keyword-only parameters of every attention function in `api`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import Unsupported
from .layout import AXES

if TYPE_CHECKING:
    import torch


class Neutral(NamedTuple):
    """A parameter for a feature that no variant has: its neutral values, the default first, and why another one is refused."""

    name: str
    accepted: tuple[Any, ...]
    reason: str


ALIASES = {"scale": "sm_scale", "softmax_scale": "sm_scale", "causal": "is_causal"}  # each None where it is not given

NEUTRAL = (
    Neutral("dropout_p", (0.0,), "the variants are for inference; sageattention.scaled_dot_product_attention hands dropout to torch"),
    Neutral("enable_gqa", (False, True), "k and v may have fewer heads than q either way"),
    Neutral("window_size", (None, (-1, -1)), "there is no sliding window; pass it as attn_mask"),
    Neutral("softcap", (None, 0.0), "scores are not capped"),
    Neutral("alibi_slopes", (None,), "there is no ALiBi; pass the bias as attn_mask"),
    Neutral("deterministic", (False, True), "every forward pass is; there is no backward pass"),
    Neutral("return_softmax", (False,), "the weights are never stored; return_lse=True gives the log-sum-exp"),
    Neutral("return_attn_probs", (False,), "the weights are never stored; return_lse=True gives the log-sum-exp"),
)

# flash-attention's `causal` and `is_causal` agree only where there are as many queries as keys.
ALIGNMENT = (
    "got True for other lengths of q and k: flash-attention aligns the last query to the last key, here the first query is aligned to the "
    "first key; is_causal=True asks for the latter, attn_mask for any other"
)

_NOTHING_GIVEN = (*(None for _ in ALIASES), *(parameter.accepted[0] for parameter in NEUTRAL))


def settle(
    q: torch.Tensor, k: torch.Tensor, tensor_layout: str, is_causal: bool, sm_scale: float | None,
    scale: float | None, softmax_scale: float | None, causal: bool | None, *neutral: Any,
) -> tuple[bool, float | None]:  # fmt: skip
    """(is_causal, sm_scale), by whichever name they came.

    Args:
        tensor_layout: "HND" or "NHD", by which the lengths of q and k are found; of packed sequences the caller compares the lengths.
        neutral: the values of `NEUTRAL`, in its order.

    Raises:
        Unsupported: a value that is not neutral, two names with different values, or `causal` where it means something else.
    """
    if (scale, softmax_scale, causal, *neutral) == _NOTHING_GIVEN:
        return is_causal, sm_scale
    for parameter, given in zip(NEUTRAL, neutral, strict=True):
        _check_neutral(parameter, given)
    for name, given in (("scale", scale), ("softmax_scale", softmax_scale)):
        if given is None:
            continue
        if sm_scale is not None and sm_scale != given:
            raise Unsupported(name, f"got {given}, by another name it is {sm_scale}; give one of sm_scale, scale and softmax_scale")
        sm_scale = given
    if causal is None:
        return is_causal, sm_scale
    if is_causal and not causal:
        raise Unsupported("causal", f"got {causal!r}, is_causal is {is_causal!r}; give one of them")
    if causal and tensor_layout in AXES:
        tokens = AXES[tensor_layout][1] - 4  # from the end: nobody has looked at the rank
        if q.shape[tokens] != k.shape[tokens]:
            raise Unsupported("causal", ALIGNMENT)
    return causal, sm_scale


def _check_neutral(parameter: Neutral, given: Any) -> None:
    value = tuple(given) if isinstance(given, list) else given
    if value not in parameter.accepted:
        accepted = " and ".join(map(repr, parameter.accepted))
        raise Unsupported(parameter.name, f"got {given!r}, accepted: {accepted}; {parameter.reason}")
