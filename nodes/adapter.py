"""The one adapter between ComfyUI's attention call and ours.

ComfyUI calls an override as `override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
skip_output_reshape=False, **more)`, where `func` is the attention that would have run, and takes its result. Tensors are
[B, L, heads·D], or [B, heads, L, D] with `skip_reshape`; the result is [B, L, heads·D], or [B, heads, L, D] with
`skip_output_reshape`. `more` holds `scale`, `enable_gqa`, `low_precision_attention`, `transformer_options`, and what later
cores add.

`attn_precision` asks for scores in fp32, which ours always are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..sageattention import KernelMissing, Unsupported, prepare, settings, tracing
from .record import Record

if TYPE_CHECKING:
    from ..sageattention.dispatch import Call

Attention = Callable[..., torch.Tensor]
MAX_FORMS = 4096


class Form(NamedTuple):
    """Calls alike in all that decides how they are computed: how q, k and v are viewed.

    Attributes:
        views: the shapes, [B, L, heads, D], of q, k and v that come as [B, L, heads·D]; None where they come as [B, heads, L, D].
        transposed: heads and tokens change places. Views of the inputs cost nothing, where a copy of the output would.
        layout: the output's, "HND" with `skip_output_reshape`, else "NHD".
    """

    views: tuple[tuple[int, ...], ...] | None
    transposed: bool
    layout: str


class SageOverride:
    """An attention override for one patched model.

    What our variant refuses, and what "auto" leaves alone, goes on unchanged to the override that was there before, or else
    to the model's own attention.

    Attributes:
        variant: a name from `sageattention.variants.VARIANTS`, or "auto".
        previous: the override that this one replaced, or None.
        record: what ran so far.
        forms: what is known of calls like earlier ones: their `Form`, or why they are left to the model's own attention on purpose.
    """

    def __init__(self, variant: str, previous: Attention | None = None):
        self.variant = variant
        self.previous = previous
        self.record = Record()
        self.forms: dict[tuple[Any, ...], Form | str] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SageOverride:
        """Itself: a clone of a patched model deep-copies its options, and the counts should stay in one place."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it starts with counts of its own."""
        return SageOverride, (self.variant, self.previous)

    def __call__(self, func: Attention, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One attention call, as the module's head describes it."""
        out = _attempt_uncompiled(self, args, kwargs) if torch.compiler.is_compiling() else _attempt(self, args, kwargs)
        if out is not None:
            return out
        if self.previous is not None:
            return self.previous(func, *args, **kwargs)
        return func(*args, **kwargs)

    def container_function(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same where the core hands q, k and v over in containers, to be let go of early, and no `func` with them."""
        out = _attempt_uncompiled(self, args, kwargs, True) if torch.compiler.is_compiling() else _attempt(self, args, kwargs, True)
        if out is not None:
            return out
        # What the model called; with `_inside_attn_wrapper` among the keywords it does not come back to us.
        from comfy.ldm.modules.attention import optimized_attention as own

        if self.previous is None:
            return own(*args, **kwargs)
        if hasattr(self.previous, "container_function"):
            return self.previous.container_function(*args, **kwargs)
        return self.previous(own.__wrapped__, *(container.take() for container in args[:3]), *args[3:], **kwargs)

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
    ) -> tuple[Call, Form] | None:
        """The call as our package takes it, or None where it is left to the model's own attention on purpose; nothing runs.

        Raises:
            Unsupported, KernelMissing: our variant can't do this call.
        """
        key: tuple[Any, ...] = (
            q.shape, k.shape, v.shape, q.dtype, q.device, None if mask is None else (mask.shape, mask.dtype),
            heads, skip_reshape, skip_output_reshape, enable_gqa, low_precision_attention, settings.state,
        )  # fmt: skip
        try:
            known = self.forms.get(key)
        except TypeError:  # symbolic sizes have no hash
            known, key = None, ()
        if isinstance(known, str):
            self.record.count_kept(known)
            return None
        if low_precision_attention is False:
            self._keep(key, "the model asks for full precision in some layers")
            return None
        if tracing.transformed():
            raise Unsupported("q", "torch.jit.trace or a torch.func transform is at work, which only torch's own attention can follow")
        if tracing.needs_grad(q, k, v):
            raise Unsupported("q", "a gradient is asked for, and quantised attention has none; training needs the model's own")
        if known is not None:
            return self._call(q, k, v, mask, scale, known), known
        if heads is None:
            raise Unsupported("heads", "the call does not say how many there are")
        form = Form(
            (_check_heads if skip_reshape else _split_heads)(q, k, v, heads, enable_gqa),
            bool(skip_reshape) != bool(skip_output_reshape),
            "HND" if skip_output_reshape else "NHD",
        )
        call = self._call(q, k, v, mask, scale, form)
        left = call.left_to_model
        if left:
            self._keep(key, left)
            return None
        self._remember(key, form)
        return call, form

    def _call(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float | None, form: Form) -> Call:
        if form.views is not None:
            of_q, of_k, of_v = form.views
            q, k, v = q.view(*of_q), k.view(*of_k), v.view(*of_v)  # a third cheaper than with a tuple
        if form.transposed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return prepare(q, k, v, form.layout, sm_scale=scale, attn_mask=_four_dimensional(mask), variant=self.variant)

    def _keep(self, key: tuple[Any, ...], reason: str) -> None:
        self._remember(key, reason)
        self.record.count_kept(reason)

    def _remember(self, key: tuple[Any, ...], form: Form | str) -> None:
        if not key:  # it has no hash
            return
        if len(self.forms) >= MAX_FORMS:
            self.forms.clear()
        self.forms[key] = form


def _attempt(override: SageOverride, args: tuple[Any, ...], kwargs: dict[str, Any], contained: bool = False) -> torch.Tensor | None:
    """Our attention's result in the shape that the model wants, or None where the call goes on to the attention behind us."""
    try:
        if contained:
            prepared = override.prepare(*(container.peek() for container in args[:3]), *args[3:], **kwargs)
        else:
            prepared = override.prepare(*args, **kwargs)
        if prepared is None:
            return None
        call, form = prepared
        result = call.attempt(functools.partial(_take, args[1], args[2]) if contained else None)
        if result is None:  # the kernel of the last candidate was found missing just now
            override.record.count_kept(call.left_to_model)
            return None
    except (Unsupported, KernelMissing) as error:
        override.record.count_fallback(str(error), layer_name(kwargs.get("transformer_options")))
        return None
    override.record.count_run(call.plan.variant.name)
    out = result[0]
    return out if form.layout == "HND" else out.flatten(2)


def _take(*containers: Any) -> None:
    """Let K and V go, which the core has left to us alone."""
    for container in containers:
        container.take()


# In a model under torch.compile our part stays out of the graph: counts are Python's, and a traced count would be a guard that
# fails, and recompiles, at every call. Attention that is left to the model is compiled with it.
_attempt_uncompiled = torch.compiler.disable(_attempt)


def layer_name(transformer_options: dict[str, Any] | None) -> str:
    """Where in the model a call comes from, as far as its options tell: "input block 4.0", "double block 7", "block 3", ""."""
    options = transformer_options if isinstance(transformer_options, dict) else {}
    block, index = options.get("block"), options.get("block_index")
    if isinstance(block, (tuple, list)) and len(block) >= 2:  # U-Nets: ("input", 4), and the index of the transformer block inside
        return f"{block[0]} block {block[1]}" + (f".{index}" if index is not None else "")
    if index is None:
        return ""
    return f"{options.get('block_type', '')} block {index}".lstrip()


def _split_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool) -> tuple[tuple[int, ...], ...]:
    """How [B, L, heads·D] is viewed as [B, L, heads, D]; k and v have fewer heads where `enable_gqa` says so."""
    _check_rank(3, "[B, L, heads*D]", q, k, v)
    inner = q.shape[2]
    if heads < 1 or inner < 1 or inner % heads:
        raise Unsupported("heads", f"got {heads}, accepted is a divisor of q's last dimension, {inner}")
    dim = inner // heads
    for name, t in (("k", k), ("v", v)):
        if (t.shape[2] != inner and not enable_gqa) or t.shape[2] % dim:
            accepted = f"a multiple of {dim}" if enable_gqa else f"q's, {inner} (fewer heads only with enable_gqa)"
            raise Unsupported(name, f"its last dimension is {t.shape[2]}, accepted is {accepted}")
    return tuple((*t.shape[:2], t.shape[2] // dim, dim) for t in (q, k, v))


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool) -> tuple[tuple[int, ...], ...] | None:
    """[B, heads, L, D] is taken as it is."""
    _check_rank(4, "[B, heads, L, D]", q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.shape[1] != heads and (name == "q" or not enable_gqa):
            raise Unsupported(name, f"it has {t.shape[1]} heads, the call says {heads}; only k and v may differ, with enable_gqa")
    return None


def _check_rank(rank: int, shape: str, *tensors: torch.Tensor) -> None:
    for name, t in zip("qkv", tensors):
        if t.dim() != rank:
            raise Unsupported(name, f"got {t.dim()} dimensions {tuple(t.shape)}, accepted are {rank}, {shape}")


def _four_dimensional(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[Lq, Lk] holds for every batch and head, [B, Lq, Lk] for every head."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None] if mask.dim() == 3 else mask
