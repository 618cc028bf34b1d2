"""The adapter between ComfyUI's attention call and ours, for dense attention.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..sageattention import KernelMissing, Unsupported, prepare, settings, tracing
from .form import Form, four_dimensional
from .override import SUSPENDED, Attention, Override
from .record import record_of
from .schedule import Schedule, Window

if TYPE_CHECKING:
    from ..sageattention.dispatch import Call
    from .guard import Guard
    from .record import Entry

F = TypeVar("F", Form, str)
MAX_FORMS = 4096


class SageOverride(Override):
    """The override of dense attention.

    What our variant refuses, and what "auto" leaves alone, goes on unchanged to the override that was there before, or else
    to the model's own attention.

    Attributes:
        variant: a name from `sageattention.variants.VARIANTS`, or "auto".
        schedule: the calls that it is for.
        guard: what watches over the error; None where nobody asked.
        forms: what is known of calls like earlier ones: their `Form`, or why they are left to the model's own attention on purpose.
        kept: an entry for each of the latter.
    """

    def __init__(self, variant: str, previous: Attention | None = None, schedule: Schedule | None = None, guard: Guard | None = None):
        super().__init__(previous)
        self.variant = variant
        self.schedule = schedule
        self.guard = guard
        self.forms: dict[tuple[Any, ...], Form | str] = {}
        self.kept: dict[tuple[Any, ...], Entry] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts with counts of its own."""
        return SageOverride, (self.variant, self.previous, self.schedule, self.guard)

    @property
    def tests_output(self) -> bool:
        return self.guard is not None

    def settings(self) -> dict[str, Any]:
        window, blocks = (self.schedule.window, self.schedule.blocks) if self.schedule else (Window(), None)
        return {
            "node": "PatchSageAttention",
            "variant": self.variant,
            "start_percent": window.start,
            "end_percent": window.end,
            "blocks": str(blocks or ""),
            "max_error": self.guard.max_error if self.guard else 0.0,
        }

    def _call(self, func: Attention | None, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor:
        """As any override's. Calls like one that was kept are most of some models' calls, and too short for much ado about them."""
        options = kwargs.get("transformer_options")
        if self.kept and func is not None and isinstance(options, dict) and not torch.compiler.is_compiling():
            try:
                like = self.kept.get(_key(*args, **kwargs))
            except TypeError:  # symbolic sizes have no hash
                like = None
            if like is not None and SUSPENDED not in options and record_of(options, self.record).again(like, options):
                return self._behind(func, args, kwargs, False)
        return super()._call(func, args, kwargs, contained)

    def attempt(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool) -> torch.Tensor | None:
        """Our attention's result, or None where the call is left to the attention behind."""
        if self.schedule is not None:
            outside = self.schedule.refusal(entry.sampling, entry.place)
            if outside:
                entry.kept(outside)
                return None
        release = functools.partial(_take, args[1], args[2]) if contained else None
        try:
            prepared = self.prepare(*(_peeked(args) if contained else args), **kwargs)
            if isinstance(prepared, str):
                entry.kept(prepared)
                if self.schedule is None and not contained and entry.reasons == (prepared,):
                    self._remember_kept(entry, args, kwargs)
                return None
            call, form = prepared
            if self.guard is not None:
                out = self.guard.run(entry, call, release)
                return None if out is None else form.give_back(out)
            result = call.attempt(release)
            if result is None:  # the kernel of the last candidate was found missing just now
                entry.kept(call.left_to_model)
                return None
        except (Unsupported, KernelMissing) as error:
            entry.fell_back(str(error))
            return None
        entry.computed(call)
        return form.give_back(result[0])

    def prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        heads: int | None = None,
        mask: torch.Tensor | None = None,
        attn_precision: torch.dtype | None = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
        low_precision_attention: bool = True,
        **others: Any,
    ) -> tuple[Call, Form] | str:
        """The call as our package takes it, or why it is left to the model's own attention on purpose; nothing runs.

        Raises:
            Unsupported, KernelMissing: our variant can't do this call.
        """
        key = _key(
            q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, enable_gqa=enable_gqa,
            low_precision_attention=low_precision_attention,
        )  # fmt: skip
        try:
            known = self.forms.get(key)
        except TypeError:  # symbolic sizes have no hash
            known, key = None, ()
        if isinstance(known, str):
            return known
        if low_precision_attention is False:
            return self._remember(key, "the model asks for full precision in some layers")
        if tracing.transformed():
            raise Unsupported("q", "torch.jit.trace or a torch.func transform is at work, which only torch's own attention can follow")
        if tracing.needs_grad(q, k, v):
            raise Unsupported("q", "a gradient is asked for, and quantised attention has none; training needs the model's own")
        if known is not None:
            return self._prepared(q, k, v, mask, scale, known), known
        form = Form.of(q, k, v, heads, skip_reshape, skip_output_reshape, enable_gqa)
        call = self._prepared(q, k, v, mask, scale, form)
        left = call.left_to_model
        if left:
            return self._remember(key, left)
        return call, self._remember(key, form)

    def _prepared(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, form: Form
    ) -> Call:  # fmt: skip
        return prepare(*form.view(q, k, v), form.layout, sm_scale=scale, attn_mask=four_dimensional(mask), variant=self.variant)

    def _remember_kept(self, entry: Entry, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(self.kept) >= MAX_FORMS:
            self.kept.clear()
        with contextlib.suppress(TypeError):  # symbolic sizes have no hash
            self.kept.setdefault(_key(*args, **kwargs), entry)

    def _remember(self, key: tuple[Any, ...], known: F) -> F:
        if key:  # else it has no hash
            if len(self.forms) >= MAX_FORMS:
                self.forms.clear()
            self.forms[key] = known
        return known


def _key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    heads: int | None = None,
    mask: torch.Tensor | None = None,
    attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    *,
    enable_gqa: bool = False,
    low_precision_attention: bool = True,
    **others: Any,
) -> tuple[Any, ...]:
    """All that decides how a call is computed, or whether."""
    return (
        q.shape, k.shape, v.shape, q.dtype, q.device, None if mask is None else (mask.shape, mask.dtype),
        heads, skip_reshape, skip_output_reshape, enable_gqa, low_precision_attention, settings.state,
    )  # fmt: skip


def _peeked(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(container.peek() for container in args[:3]), *args[3:])


def _take(*containers: Any) -> None:
    """Let K and V go, which the core has left to us alone."""
    for container in containers:
        container.take()
