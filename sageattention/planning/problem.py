"""`Problem`: one attention call as plain, hashable data. All validation of a call happens here and nowhere else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TorchOnly, Unsupported
from ..layout import AXES
from ..precision import autocasts
from ..tracing import needs_grad

if TYPE_CHECKING:
    import torch

MAX_HEAD_DIM = 256  # of the variants; torch's own attention has no limit
DTYPES = ("float16", "bfloat16", "float32")
TORCH_DTYPES = (*DTYPES, "float64")
_NUMBERS = (float, int, type(None))  # of which a scale usually is


class Problem(NamedTuple):
    """What is asked, without the tensors: everything a plan may depend on.

    Lengths are in tokens. `mask` is the kind of the dense mask: "none", "bool" (True keeps) or "additive" (a float bias
    in natural-log units). `varlen` problems are packed along the tokens; their lengths are those of the longest sequence.
    """

    batch: int
    heads_q: int
    heads_kv: int
    len_q: int
    len_kv: int
    head_dim: int
    dtype: str
    device: str  # "cuda", "cpu", …
    device_index: int  # −1 where the device has none
    layout: str = "HND"
    causal: bool = False
    mask: str = "none"
    sm_scale: float = 1.0
    return_lse: bool = False
    varlen: bool = False
    needs_grad: bool = False  # autograd records this call, backward or forward
    head_dim_v: int = 0  # V's, where it differs from that of Q and K
    mask_shape: tuple[int, int, int] = (1, 1, 1)  # batches, heads, queries of the mask: 1 where it is the same for all

    @property
    def empty(self) -> bool:
        """True where there is nothing to compute: the output is empty, or (no keys) zero."""
        return not (self.batch and self.heads_q and self.len_q and self.len_kv)

    @property
    def mask_kind(self) -> str:
        """The kind of kernel it takes: "none", "causal", "list" (a dense mask, which may be causal, too) or "packed" (so may these)."""
        if self.varlen:
            return "packed"
        return "list" if self.mask != "none" else "causal" if self.causal else "none"

    @property
    def beyond_variants(self) -> Unsupported | None:
        """What of the call only torch's own attention computes; None where a variant may."""
        if self.dtype not in DTYPES:
            return Unsupported("q", f"its dtype is {self.dtype}, accepted are {', '.join(DTYPES)}")
        if self.head_dim > MAX_HEAD_DIM:
            return Unsupported("q", f"its head_dim is {self.head_dim}, accepted are 1 to {MAX_HEAD_DIM}")
        if self.head_dim_v:
            return Unsupported("v", f"its head_dim is {self.head_dim_v}, q's is {self.head_dim}; they must be equal")
        return None

    @classmethod
    def from_tensors(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        tensor_layout: str = "HND",
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
        sm_scale: float | None = None,
        return_lse: bool = False,
    ) -> Problem:
        """Check one call and describe it.

        Raises:
            Unsupported: an argument that no variant accepts; it names the argument, what was given, what is accepted.
        """
        _check_layout(tensor_layout)
        _check_rank(4, tensor_layout, (("q", q), ("k", k), ("v", v)))
        _check_alike(("q", q), ("k", k), ("v", v), accepted=TORCH_DTYPES)
        heads, tokens = AXES[tensor_layout]
        (batch, head_dim), heads_q, heads_kv = (q.shape[0], q.shape[3]), q.shape[heads], k.shape[heads]
        len_q, len_kv = q.shape[tokens], k.shape[tokens]
        if k.shape[0] != batch:
            kind = TorchOnly if 1 in (k.shape[0], batch) else Unsupported
            raise kind("k", f"its batch is {k.shape[0]}, q's is {batch}; they must be equal")
        if k.shape[:3] != v.shape[:3]:
            kind = TorchOnly if len_kv == v.shape[tokens] else Unsupported
            raise kind("v", f"its shape is {tuple(v.shape)}, k's is {tuple(k.shape)}; they must be equal but for head_dim")
        _check_heads(heads_q, heads_kv)
        _check_head_dim(None, ("q", q), ("k", k))
        _check_head_dim(None, ("v", v))
        mask, mask_shape = "none", (1, 1, 1)
        if attn_mask is not None:
            mask, mask_shape = _check_mask(attn_mask, (batch, heads_q, len_q, len_kv), q)
        return cls(
            batch, heads_q, heads_kv, len_q, len_kv, head_dim, _dtype_name(q), *_device(q), tensor_layout,
            as_flag("is_causal", is_causal), mask,
            _scale(sm_scale, head_dim), as_flag("return_lse", return_lse), needs_grad=needs_grad(q, k, v, attn_mask),
            head_dim_v=0 if v.shape[3] == head_dim else v.shape[3], mask_shape=mask_shape,
        )  # fmt: skip

    @classmethod
    def from_kv(cls, k: torch.Tensor, v: torch.Tensor, *, tensor_layout: str, key_mask: torch.Tensor | None = None) -> Problem:
        """K and V alone, for `with_query` to complete. Its mask is "bool" where some keys are hidden from every query.

        Raises:
            Unsupported: as `from_tensors`, but never of q.
        """
        _check_layout(tensor_layout)
        _check_rank(4, tensor_layout, (("k", k), ("v", v)))
        _check_alike(("k", k), ("v", v))
        _check_kv(k, v)
        _check_head_dim(MAX_HEAD_DIM, ("k", k))
        heads, tokens = AXES[tensor_layout]
        batch, heads_kv, len_kv, head_dim = k.shape[0], k.shape[heads], k.shape[tokens], k.shape[3]
        mask, mask_shape = "none", (1, 1, 1)
        if key_mask is not None:
            mask, mask_shape = _check_key_mask(key_mask, batch, len_kv, k)
        return cls(
            batch, heads_kv, heads_kv, len_kv, len_kv, head_dim, _dtype_name(k), *_device(k), tensor_layout, mask=mask,
            sm_scale=_scale(None, head_dim), needs_grad=needs_grad(k, v), mask_shape=mask_shape,
        )  # fmt: skip

    def with_query(
        self,
        q: torch.Tensor,
        *,
        is_causal: bool = False,
        attn_mask: torch.Tensor | None = None,
        sm_scale: float | None = None,
        return_lse: bool = False,
    ) -> Problem:
        """This problem's k and v, which were checked and may be gone, with another q: check it and describe the call.

        Raises:
            Unsupported: as `from_tensors`.
        """
        _check_rank(4, self.layout, (("q", q),))
        heads, tokens = AXES[self.layout]
        given = (q.shape[0], q.shape[3], _dtype_name(q), *_device(q))
        quantised = (self.batch, self.head_dim, self.dtype, self.device, self.device_index)
        if given != quantised:
            raise Unsupported("q", f"its (batch, head_dim, dtype, device, index) is {given}, the quantised k and v's is {quantised}")
        _check_heads(q.shape[heads], self.heads_kv)
        if needs_grad(q, attn_mask):
            raise Unsupported("q", "a gradient is asked for, and attention to quantised k and v has none")
        mask, mask_shape = "none", (1, 1, 1)
        if attn_mask is None and self.mask != "none":
            raise Unsupported("attn_mask", "is None, and k and v were quantised with a key_mask; pass a mask that hides those keys")
        if attn_mask is not None:
            mask, mask_shape = _check_mask(attn_mask, (self.batch, q.shape[heads], q.shape[tokens], self.len_kv), q)
        return self._replace(
            heads_q=q.shape[heads], len_q=q.shape[tokens], causal=as_flag("is_causal", is_causal), mask=mask,
            sm_scale=_scale(sm_scale, self.head_dim), return_lse=as_flag("return_lse", return_lse), mask_shape=mask_shape,
        )  # fmt: skip

    @classmethod
    def from_packed(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        is_causal: bool = False,
        sm_scale: float | None = None,
        return_lse: bool = False,
    ) -> Problem:
        """Check one call with sequences packed along the tokens, [total, H, D], and describe it.

        `len_q` and `len_kv` of the result are the longest sequence's lengths, as the caller bounds them.

        Raises:
            Unsupported: as `from_tensors`.
        """
        _check_rank(3, "packed [total, H, D]", (("q", q), ("k", k), ("v", v)))
        _check_alike(("q", q), ("k", k), ("v", v))
        _check_kv(k, v)
        _check_heads(q.shape[1], k.shape[1])
        _check_head_dim(MAX_HEAD_DIM, ("q", q), ("k", k))
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if not hasattr(cu, "dim"):
                raise Unsupported(name, f"got {type(cu).__name__}, accepted is a torch.Tensor of int32 or int64")
            check_plain(name, cu)
            if cu.dim() != 1 or cu.numel() < 1 or _dtype_name(cu) not in ("int32", "int64"):
                raise Unsupported(name, f"got {cu.dtype} of shape {tuple(cu.shape)}, accepted is int32 or int64 of shape [batch + 1]")
            if cu.device != q.device:
                raise Unsupported(name, f"is on {cu.device}, q is on {q.device}; they must be on one device")
        if cu_seqlens_q.numel() != cu_seqlens_k.numel():
            raise Unsupported(
                "cu_seqlens_k", f"holds {cu_seqlens_k.numel()} offsets, cu_seqlens_q holds {cu_seqlens_q.numel()}; they must be equal"
            )
        longest_q, longest_k = _length("max_seqlen_q", max_seqlen_q), _length("max_seqlen_k", max_seqlen_k)
        return cls(
            cu_seqlens_q.numel() - 1, q.shape[1], k.shape[1], min(longest_q, q.shape[0]), min(longest_k, k.shape[0]), q.shape[2],
            _dtype_name(q), *_device(q), "NHD", as_flag("is_causal", is_causal), "none",
            _scale(sm_scale, q.shape[2]), as_flag("return_lse", return_lse), True, needs_grad(q, k, v),
        )  # fmt: skip


def facts(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    layout: str,
    causal: bool,
    sm_scale: float | None,
    return_lse: bool,
) -> tuple | None:
    """All that the checks of `from_tensors` and a call's launches depend on, addresses aside; None for arguments of unusual types, which
    have to be looked at. Equal facts, equal calls."""
    if not (type(sm_scale) in _NUMBERS and type(causal) is type(return_lse) is bool and type(layout) is str):
        return None
    try:
        return (
            type(q), q.shape, q.dtype, q.device, q.stride(), type(k), k.shape, k.dtype, k.device, k.stride(),
            type(v), v.shape, v.dtype, v.device, v.stride(),
            mask if mask is None else (type(mask), mask.shape, mask.dtype, mask.device, mask.layout, mask.stride()),
            layout, causal, sm_scale, return_lse, needs_grad(q, k, v, mask),
        )  # fmt: skip
    except (AttributeError, IndexError, TypeError, RuntimeError):  # not tensors, without dimensions or strides: the checks say so
        return None


def _dtype_name(t: torch.Tensor) -> str:
    return str(t.dtype)[6:]  # "torch.float16" → "float16"


def _device(t: torch.Tensor) -> tuple[str, int]:
    return t.device.type, -1 if t.device.index is None else t.device.index


def _check_rank(rank: int, layout: str, tensors: tuple[tuple[str, torch.Tensor], ...]) -> None:
    for name, t in tensors:
        if not hasattr(t, "dim"):
            raise Unsupported(name, f"got {type(t).__name__}, accepted is a torch.Tensor")
        check_plain(name, t)
        if t.dim() != rank:
            raise TorchOnly(name, f"got {t.dim()} dimensions {tuple(t.shape)}, accepted are {rank} ({layout})")
        if t.numel() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise TorchOnly(name, f"its last stride is {t.stride(-1)}, accepted is 1 (head_dim contiguous); call .contiguous()")


def check_plain(name: str, t: torch.Tensor) -> None:
    """No tensor but one whose elements lie in memory, by strides."""
    if getattr(t, "is_nested", False):
        raise TorchOnly(name, "is a nested tensor, accepted is a dense one: pad it (and mask), or call sageattn_varlen")
    if str(t.layout) != "torch.strided":
        raise Unsupported(name, f"its layout is {t.layout}, accepted is a dense tensor; call .to_dense()")
    own: Any = type(t)
    base: Any = next(c for c in own.__mro__ if c.__module__ == "torch" and c.__name__ == "Tensor")
    if own.__torch_dispatch__ is not base.__torch_dispatch__:
        kind = Unsupported if type(t).__name__ == "FakeTensor" else TorchOnly
        raise kind(name, f"is a {type(t).__name__}, which may hold no data of its own; accepted is a plain torch.Tensor")


def _check_layout(layout: str) -> None:
    if not isinstance(layout, str) or layout not in AXES:
        raise Unsupported("tensor_layout", f"got {layout!r}, accepted are 'HND' [B, H, N, D] and 'NHD' [B, N, H, D]")


def _check_alike(first: tuple[str, torch.Tensor], *others: tuple[str, torch.Tensor], accepted: tuple[str, ...] = DTYPES) -> None:
    leader, like = first
    if _dtype_name(like) not in accepted:
        raise Unsupported(leader, f"its dtype is {like.dtype}, accepted are {', '.join(accepted)}")
    for name, t in others:
        if t.dtype != like.dtype:
            kind = TorchOnly if autocasts(t.device.type) else Unsupported
            raise kind(name, f"its dtype is {t.dtype}, {leader}'s is {like.dtype}; they must be equal")
        if t.device != like.device:
            raise Unsupported(name, f"is on {t.device}, {leader} is on {like.device}; they must be on one device")


def _check_kv(k: torch.Tensor, v: torch.Tensor) -> None:
    if k.shape != v.shape:
        raise Unsupported("v", f"its shape is {tuple(v.shape)}, k's is {tuple(k.shape)}; they must be equal")


def _check_heads(heads_q: int, heads_kv: int) -> None:
    if heads_q and (heads_kv == 0 or heads_q % heads_kv):
        raise Unsupported("k", f"q has {heads_q} heads and k has {heads_kv}; q's must be a multiple of k's (grouped-query attention)")


def _check_head_dim(limit: int | None, first: tuple[str, torch.Tensor], *others: tuple[str, torch.Tensor]) -> None:
    leader, head_dim = first[0], first[1].shape[-1]
    for name, t in others:
        if t.shape[-1] != head_dim:
            raise Unsupported(name, f"its head_dim is {t.shape[-1]}, {leader}'s is {head_dim}; they must be equal")
    if head_dim < 1 or (limit and head_dim > limit):
        raise Unsupported(leader, f"its head_dim is {head_dim}, accepted are 1 to {MAX_HEAD_DIM}")


def _check_mask(mask: torch.Tensor, scores: tuple[int, int, int, int], q: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    """(`Problem.mask`, `Problem.mask_shape`)"""
    if not hasattr(mask, "dim"):
        raise Unsupported("attn_mask", f"got {type(mask).__name__}, accepted is a torch.Tensor, bool (True keeps) or float (added)")
    check_plain("attn_mask", mask)
    shape = tuple(mask.shape)
    padded = (1,) * (4 - len(shape)) + shape
    if len(shape) > 4 or any(m not in (1, s) for m, s in zip(padded, scores)):
        raise Unsupported("attn_mask", f"its shape is {shape}, accepted is one that broadcasts to [B, H, Nq, Nk] = {list(scores)}")
    if mask.device != q.device:
        raise Unsupported("attn_mask", f"is on {mask.device}, q is on {q.device}; they must be on one device")
    sizes = [1 if stride == 0 else size for size, stride in zip(shape, mask.stride())]
    batches, heads, rows, _ = [1] * (4 - len(sizes)) + sizes
    if _is_bool(mask):
        return "bool", (batches, heads, rows)
    if _dtype_name(mask) not in DTYPES and mask.dtype != q.dtype:
        raise Unsupported("attn_mask", f"its dtype is {mask.dtype}, accepted are bool (True keeps) and {', '.join(DTYPES)} (added)")
    return "additive", (batches, heads, rows)


def _check_key_mask(mask: torch.Tensor, batch: int, len_kv: int, k: torch.Tensor) -> tuple[str, tuple[int, int, int]]:
    """As `_check_mask`."""
    if not hasattr(mask, "dim"):
        raise Unsupported("key_mask", f"got {type(mask).__name__}, accepted is a torch.Tensor of bool (True keeps)")
    check_plain("key_mask", mask)
    if not _is_bool(mask) or mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != len_kv:
        accepted = f"bool (True keeps) of shape [B | 1, Nk] = {[batch, len_kv]}"
        raise Unsupported("key_mask", f"got {mask.dtype} of shape {tuple(mask.shape)}, accepted is {accepted}")
    if mask.device != k.device:
        raise Unsupported("key_mask", f"is on {mask.device}, k is on {k.device}; they must be on one device")
    return "bool", (mask.shape[0] if mask.stride(0) else 1, 1, 1)


def _is_bool(mask: torch.Tensor) -> bool:
    return _dtype_name(mask) == "bool"


def _scale(sm_scale: float | None, head_dim: int) -> float:
    if sm_scale is None:
        return head_dim**-0.5
    if isinstance(sm_scale, bool):
        raise Unsupported("sm_scale", f"got {sm_scale}, accepted is a number; is_causal is the parameter before it")
    try:
        scale = float(sm_scale)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        raise Unsupported("sm_scale", f"got {sm_scale!r}, accepted is a finite number") from None
    if not math.isfinite(scale):
        raise Unsupported("sm_scale", f"got {scale}, accepted is a finite number")
    return scale


def as_flag(name: str, given: bool | None) -> bool:
    """True or False, whatever type it comes in (None is False). Of anything else, such as a text, the truth is not what it says."""
    try:
        known = given is None or given in (False, True)
    except (TypeError, ValueError, RuntimeError):  # of several elements
        known = False
    if not known:
        raise Unsupported(name, f"got {given!r}, accepted are True and False")
    return bool(given)


def _length(name: str, given: int) -> int:
    try:
        length = int(given) if given >= 0 else -1
    except (TypeError, ValueError, OverflowError, RuntimeError):  # no number, infinite, of several elements
        length = -1
    if length < 0:
        raise Unsupported(name, f"got {given!r}, accepted are lengths >= 0")
    return length
