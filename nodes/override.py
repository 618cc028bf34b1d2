"""What every attention override of ours is to ComfyUI: how it is called, what it passes on to, and that it keeps a record.

ComfyUI calls an override as `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **more)`, where `func` is the attention that would have run, and takes its result. Tensors are
[B, L, heads·D], or [B, heads, L, D] with `skip_reshape`; the result is [B, L, heads·D], or [B, heads, L, D] with
`skip_output_reshape`. `more` holds `scale`, `enable_gqa`, `low_precision_attention`, `transformer_options`, and what later
cores add.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .record import Entry, Record, record_of

Attention = Callable[..., torch.Tensor]
O = TypeVar("O", bound="Override")

SUSPENDED = "sageattention_suspended"  # in transformer_options: all of ours pass every call on
SAGE = ("attention_sage", "attention3_sage")  # what the start flags make the model's own attention


class Override:
    """An attention override for one patched model; a subclass's `attempt` computes what it can.

    Attributes:
        RANK: overrides of ours in one model stand in this order, the highest in front, however their nodes are ordered.
        previous: the attention override behind this one, ours or another pack's, or None.
        record: where it writes what happened, unless the model that it is called for has one.
        node_id: the node that made it, which shows a line while it samples; "" for none.
    """

    RANK = 0

    def __init__(self, previous: Attention | None = None):
        self.previous = previous
        self.record = Record()
        self.node_id = ""

    def __deepcopy__(self: O, memo: dict[int, Any]) -> O:
        """Itself: a clone of a patched model deep-copies its options, and what was learnt of calls should stay in one place."""
        return self

    def in_front_of(self: O, previous: Attention | None, record: Record) -> O:
        """This override with another one behind it, and another record; it shares all else with this one."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, previous=previous, record=record)
        return other

    @property
    def tests_output(self) -> bool:
        """Whether the model's output is to be tested, and a step to be run again without us where it is not finite."""
        return False

    def settings(self) -> dict[str, Any]:
        """Of the node that made it, as plain data: for the report."""
        raise NotImplementedError

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """The result in the shape that the model wants, or None where the call goes on to the attention behind; `entry` is told why.

        Args:
            args, kwargs: the call, from q on.
            contained: q, k and v come in containers: `peek()` looks, `take()` lets go of them.
        """
        raise NotImplementedError

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One attention call, as the module's head describes it."""
        return self._call(func, args, kwargs, False)

    def container_function(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same where the core hands q, k and v over in containers, to be let go of early, and no `func` with them."""
        return self._call(None, args, kwargs, True)

    def _call(self, func: Attention | None, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor:
        options = kwargs.get("transformer_options")
        if isinstance(options, dict) and options.get(SUSPENDED):
            return self._behind(func, args, kwargs, True)
        if torch.compiler.is_compiling():
            out, exact = _attempt_uncompiled(self, args, kwargs, contained)
            return self._behind(func, args, kwargs, exact) if out is None else out
        entry = self._open(args, kwargs, contained)
        try:
            out = self.attempt(entry, args, kwargs, contained)
            if out is None:
                out = self._behind(func, args, kwargs, entry.exact)
                if not entry.variant:
                    entry.kernel = self._name_behind(func)
            return out
        finally:
            entry.close()

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> Entry:
        options = kwargs.get("transformer_options")
        q, k = args[:2] if len(args) > 1 else (kwargs["q"], kwargs["k"])
        if contained:
            q, k = q.peek(), k.peek()
        heads = args[3] if len(args) > 3 else kwargs.get("heads")
        hnd = args[6] if len(args) > 6 else kwargs.get("skip_reshape", False)
        mask = args[4] if len(args) > 4 else kwargs.get("mask")
        return record_of(options, self.record).open(options, q, k, heads, hnd, mask is not None)

    def _name_behind(self, func: Attention | None) -> str:
        behind = self.previous or func
        return "" if behind is None else getattr(behind, "__name__", type(behind).__name__)

    def _behind(self, func: Attention | None, args: tuple[Any, ...], kwargs: dict[str, Any], exact: bool) -> torch.Tensor:
        """The attention behind this one.

        Args:
            func: None where q, k and v come in containers.
            exact: it has to be unquantised, whatever the start flags say.
        """
        previous = self.previous
        if func is not None:
            func = unquantised(func) if exact else func
            return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
        if previous is not None and hasattr(previous, "container_function"):
            return previous.container_function(*args, **kwargs)
        # What the model called; with `_inside_attn_wrapper` among the keywords it does not come back to us.
        from comfy.ldm.modules.attention import optimized_attention as own

        if previous is None and not exact:
            return own(*args, **kwargs)
        args = (*(container.take() for container in args[:3]), *args[3:])
        return self._behind(own.__wrapped__, args, kwargs, exact)


def take(containers: tuple[Any, ...]) -> None:
    """Let q, k and v go, which the core has left to us alone."""
    for container in containers:
        container.take()


def unquantised(func: Attention) -> Attention:
    """A core's attention function, or PyTorch's in its place where it is sageattention's."""
    if getattr(func, "__name__", "") not in SAGE:
        return func
    from comfy.ldm.modules.attention import attention_pytorch

    return getattr(attention_pytorch, "__wrapped__", attention_pytorch)


def _attempt(
    override: Override, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool
) -> tuple[torch.Tensor | None, bool]:  # fmt: skip
    entry = override._open(args, kwargs, contained)
    try:
        out = override.attempt(entry, args, kwargs, contained)
        if out is None and isinstance(override.previous, Override):
            entry.hand_over()
        return out, entry.exact
    finally:
        entry.close()


# torch.compile can't trace into kernels that it does not know, nor into a record: a count in a graph would be a guard that fails, and
# recompiles, at every call. Attention that is left to the model is compiled with it.
_attempt_uncompiled = torch.compiler.disable(_attempt)
