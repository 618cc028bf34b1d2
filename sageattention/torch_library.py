"""The calls as registered torch operators, for torch.compile alone: one opaque node each, no graph break.

In eager mode the functions of `dispatch` are called as they are, because an operator costs 6 µs a call. The namespace is the
package's own import name, so that a copy bundled under a private name lives beside an installed one; where that name is taken
(the package was loaded twice under it) a number is appended.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import torch

from . import dispatch, packed_dispatch, sparse_dispatch, torch_internals
from .backends.call import Result
from .backends.sdpa import by_torch_alone as by_torch_alone  # for `api`
from .layout import AXES
from .planning.sparse_problem import token_ranges
from .tracing import needs_grad

_is_exporting = getattr(torch.compiler, "is_exporting", bool)  # torch < 2.7 does not tell
# Inputs keep the strides the caller gave them (the last must stay 1).
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_CALL = "Tensor q, Tensor k, Tensor v, Tensor? mask, str layout, bool causal, float? sm_scale, str variant, str accum"
_VARLEN = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float? sm_scale, str variant, str accum"
)
_SPARSE = (
    "Tensor q, Tensor k, Tensor v, str layout, bool causal, float? sm_scale, str variant, str selection, float? tau, "
    "Tensor? tau_of_heads, float? keep, Tensor? keep_of_heads, float similarity, int q_block, bool tail, int? neighbours, "
    "SymInt? q_start, SymInt[] sinks, SymInt[] query_sinks, Tensor? order, Tensor? block_len, Tensor? block_mask, Tensor? key_mask, "
    "Tensor? coarse_gate"
)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, layout: str, causal: bool,
    sm_scale: float | None, variant: str, accum: str,
) -> torch.Tensor:  # fmt: skip
    return _run(q, k, v, mask, layout, causal, sm_scale, False, variant, accum)[0]


def _attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, layout: str, causal: bool,
    sm_scale: float | None, variant: str, accum: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = _run(q, k, v, mask, layout, causal, sm_scale, True, variant, accum)
    assert lse is not None  # asked for
    return out, lse


def _run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, layout: str, causal: bool,
    sm_scale: float | None, return_lse: bool, variant: str, accum: str,
) -> Result:  # fmt: skip
    out, lse = dispatch.compute(
        q, k, v, tensor_layout=layout, is_causal=causal, attn_mask=mask, sm_scale=sm_scale, return_lse=return_lse,
        variant=variant, accum=accum, compiled=True,
    )  # fmt: skip
    return out.contiguous(), lse  # as the fake says; SDPA's strides vary with its backend


def _fake_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, layout: str, causal: bool,
    sm_scale: float | None, variant: str, accum: str,
) -> torch.Tensor:  # fmt: skip
    batch = max(q.shape[0], k.shape[0], v.shape[0]) if q.dim() == k.dim() == v.dim() == 4 else q.shape[0]  # torch's broadcasts
    return q.new_empty((batch, *q.shape[1:-1], v.shape[-1]))


def _fake_attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, layout: str, causal: bool,
    sm_scale: float | None, variant: str, accum: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    heads, tokens = AXES[layout]
    lse = q.new_empty((q.shape[0], q.shape[heads], q.shape[tokens]), dtype=torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, sm_scale: float | None, variant: str, accum: str,
) -> torch.Tensor:  # fmt: skip
    out, _ = packed_dispatch.compute(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=causal, sm_scale=sm_scale, return_lse=False,
        variant=variant, accum=accum,
    )  # fmt: skip
    return out.contiguous()


def _varlen_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, sm_scale: float | None, variant: str, accum: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = packed_dispatch.compute(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=causal, sm_scale=sm_scale, return_lse=True,
        variant=variant, accum=accum,
    )  # fmt: skip
    assert lse is not None  # asked for
    return out.contiguous(), lse.contiguous()


def _fake_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, *arguments: Any
) -> torch.Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _fake_varlen_lse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def sparse_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, causal: bool, sm_scale: float | None, variant: str,
    *, selection: str, tau: float | torch.Tensor | None, keep: float | torch.Tensor | None, similarity: float, q_block: int, tail: bool,
    neighbours: int | None, q_start: int | None, sinks: Any, query_sinks: Any, **tensors: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, lse, share) of `sageattn_sparse`'s arguments by the operator `sparse`, whose schema knows no unions."""
    thresholds = [(None, given) if isinstance(given, torch.Tensor) else (given, None) for given in (tau, keep)]
    flat = [
        [token for pair in token_ranges(name, given) for token in pair]
        for name, given in (("sinks", sinks), ("query_sinks", query_sinks))
    ]  # fmt: skip
    operator = sparse_untraced if compiled_with_grad(q, k, v) else sparse
    return operator(
        q, k, v, layout, causal, sm_scale, variant, selection, *thresholds[0], *thresholds[1], similarity, q_block, tail, neighbours,
        q_start, *flat, *(tensors[name] for name in ("order", "block_len", "block_mask", "key_mask", "coarse_gate")),
    )  # fmt: skip


def _sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, causal: bool, sm_scale: float | None, variant: str, selection: str,
    tau: float | None, tau_of_heads: torch.Tensor | None, keep: float | None, keep_of_heads: torch.Tensor | None, similarity: float,
    q_block: int, tail: bool, neighbours: int | None, q_start: int | None, sinks: list[int], query_sinks: list[int],
    order: torch.Tensor | None, block_len: torch.Tensor | None, block_mask: torch.Tensor | None, key_mask: torch.Tensor | None,
    coarse_gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    call = sparse_dispatch.prepare(
        q, k, v, tensor_layout=layout, is_causal=causal, sm_scale=sm_scale, return_lse=True, variant=variant, selection=selection,
        tau=tau if tau_of_heads is None else tau_of_heads, keep=keep if keep_of_heads is None else keep_of_heads, similarity=similarity,
        q_block=q_block, tail=tail, neighbours=neighbours, q_start=q_start, sinks=list(zip(sinks[::2], sinks[1::2])),
        query_sinks=list(zip(query_sinks[::2], query_sinks[1::2])), order=order, block_len=block_len, block_mask=block_mask,
        key_mask=key_mask, coarse_gate=coarse_gate,
    )  # fmt: skip
    result = call.run()
    assert result.lse is not None  # asked for
    return result.out, result.lse, result.share


def _fake_sparse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    return *_fake_attention_lse(q, k, v, None, layout, False, None, "", ""), q.new_empty((), dtype=torch.float32)


def _free_namespace() -> str:
    base = re.sub(r"\W", "_", __package__ or "sageattention", flags=re.ASCII)
    for number in itertools.count(1):
        name = base if number == 1 else f"{base}_{number}"
        if not hasattr(getattr(torch.ops, name), "attention"):
            return name
    raise AssertionError("itertools.count ends")


def _below_autograd(name: str, impl: Callable[..., Any]) -> Callable[..., Any]:
    """What autograd runs as the operator. It has no gradient, and would drop one in silence: a call that asks for one is refused, or runs
    SDPA, as in eager mode. Tensors without data, of torch.export for one, are only looked at."""

    def run(*arguments: Any) -> Any:
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        if not isinstance(tensors[0], (*torch_internals.FAKE_TENSORS, *torch_internals.FUNCTIONAL_TENSORS)) and needs_grad(*tensors):
            return impl(*arguments)
        with torch_internals.below_autograd():
            return getattr(getattr(torch.ops, NAMESPACE), name).default(*arguments)

    return run


def compiled_with_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether torch.compile meets a call that asks for a gradient: such a call breaks the graph. An exported one is for inference."""
    return torch.compiler.is_dynamo_compiling() and not _is_exporting() and needs_grad(*tensors)


NAMESPACE = _free_namespace()
_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # kept: the operators go with it
for _name, _schema, _impl, _fake in (
    ("attention", f"({_CALL}) -> Tensor", _attention, _fake_attention),
    ("attention_lse", f"({_CALL}) -> (Tensor, Tensor)", _attention_lse, _fake_attention_lse),
    ("varlen", f"({_VARLEN}) -> Tensor", _varlen, _fake_varlen),
    ("varlen_lse", f"({_VARLEN}) -> (Tensor, Tensor)", _varlen_lse, _fake_varlen_lse),
    ("sparse", f"({_SPARSE}) -> (Tensor, Tensor, Tensor)", _sparse, _fake_sparse),
):
    _library.define(_name + _schema, tags=_TAGS)
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    _library.impl(_name, _below_autograd(_name, _impl), "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)

attention = getattr(torch.ops, NAMESPACE).attention.default
attention_lse = getattr(torch.ops, NAMESPACE).attention_lse.default
varlen = getattr(torch.ops, NAMESPACE).varlen.default
varlen_lse = getattr(torch.ops, NAMESPACE).varlen_lse.default
sparse = getattr(torch.ops, NAMESPACE).sparse.default
# What `compiled_with_grad` calls run instead.
attention_untraced, attention_lse_untraced, varlen_untraced, varlen_lse_untraced, sparse_untraced = map(
    torch.compiler.disable, (_attention, _attention_lse, _varlen, _varlen_lse, _sparse)
)
