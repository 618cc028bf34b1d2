"""The public functions. Names and positional order are upstream's, because ComfyUI, KJNodes and diffusers call them.

Shapes, the same for every function here: `tensor_layout="HND"` is [B, H, N, D], `"NHD"` is [B, N, H, D]; q has Hq heads and
Nq tokens, k and v have Hkv heads (Hq a multiple of Hkv) and Nk tokens; head_dim D is 1 to 256. All three are fp16, bf16 or fp32,
of one dtype, on one device, their last stride 1 and the others any. The output has q's shape, dtype and layout.
`sageattn`, where no variant is named, and `scaled_dot_product_attention` take whatever else torch's function takes, and run it there:
larger head_dim, a V of another width, fp64, gradients, tensors of another rank, sizes that broadcast, and dtypes that torch.autocast makes
one (HND, without an lse).
`attn_mask` is bool (True keeps) or additive (fp16, bf16, fp32; natural-log units), broadcastable to [B, Hq, Nq, Nk].
`is_causal` keeps keys up to the query's own index, as torch's SDPA does. `sm_scale` defaults to D^−0.5.
With `return_lse` the result is (out, lse [B, Hq, Nq] fp32, natural log).
The parameters after `attn_mask` or `pv_accum_dtype`, from `dropout_p` on, are those of `neutral`: accepted because programs pass them.
As `torch.nn.functional.scaled_dot_product_attention` is called, by position or keyword, so can every function be: an attn_mask (or
None) in tensor_layout's place is followed by dropout_p and is_causal.
Finite inputs give finite outputs; a fully masked row gives 0 and an lse of −inf.

Errors: `Unsupported` (a ValueError; nothing has run, another attention may be tried), `KernelMissing`, `CudaError`.
Source of the method: SageAttention (arXiv:2410.02367) and SageAttention2 (arXiv:2411.10958).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from . import neutral
from .errors import KernelMissing, TorchOnly, Unsupported
from .variants import CUDA_FP8, CUDA_FP8_SM90, CUDA_FP16, CUDA_INT8, TRITON_FP16, VARIANTS, Variant

if TYPE_CHECKING:
    from types import ModuleType

    import torch

    from .backends.call import QuantizedKV
    from .dispatch import Call
    from .planning.plan import Plan
    from .planning.problem import Problem

    Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

LSE_LAYOUTS = ("HN", "NH")
QK_QUANT_GRAN = ("per_warp", "per_thread")
PV_ACCUM_DTYPES = tuple(dict.fromkeys(accum for variant in VARIANTS.values() for accum in variant.accum))


def sageattn(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None, smooth_k: bool = True, variant: str = "auto", qk_quant_gran: str = "per_thread",
    pv_accum_dtype: str | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """Attention by the variant that suits the call and the machine best (`explain` tells which and why).

    Args:
        variant: "auto", or a name from `available_variants()`. `SAGEATTENTION_VARIANT` replaces "auto" where it is set.
        smooth_k: accepted for compatibility; K is always shifted, which leaves the exact result as it is.
        qk_quant_gran: accepted for compatibility; the finest granularity is always used.
        pv_accum_dtype: the accumulator of P·V; of "auto" it narrows the choice to the variants that have it, if one that runs has.
    """
    if not isinstance(tensor_layout, str):
        attn_mask, dropout_p, is_causal = _by_position(tensor_layout, attn_mask, dropout_p, is_causal, sm_scale)
        tensor_layout, sm_scale = "HND", None if isinstance(sm_scale, bool) else sm_scale
    _check_choice("qk_quant_gran", qk_quant_gran, QK_QUANT_GRAN)
    if pv_accum_dtype is not None:
        _check_choice("pv_accum_dtype", pv_accum_dtype, PV_ACCUM_DTYPES)
    is_causal, sm_scale = neutral.settle(
        q, k, tensor_layout, is_causal, sm_scale,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, variant, pv_accum_dtype or "")


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """`sageattn` with the signature of torch.nn.functional.scaled_dot_product_attention, to be put in its place.

    Dropout, as for training, is torch's to do.
    """
    if dropout_p:
        from . import torch_internals

        return torch_internals.attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    out = _call(query, key, value, "HND", is_causal, scale, False, attn_mask, "auto")
    return cast("torch.Tensor", out)


def sageattn_qk_int8_pv_fp16_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", quantization_backend: str = "triton",
    is_causal: bool = False, attn_mask: torch.Tensor | None = None, sm_scale: float | None = None, smooth_k: bool = True,
    return_lse: bool = False,
    *,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """INT8 QKᵀ and FP16 PV with FP32 accumulation, in Triton. `quantization_backend` and `smooth_k` change nothing."""
    if not isinstance(tensor_layout, str):
        attn_mask, dropout_p, is_causal = _by_position(tensor_layout, attn_mask, dropout_p, quantization_backend, is_causal)
        tensor_layout = "HND"
    else:
        _check_choice("quantization_backend", quantization_backend, ("triton", "cuda"))
    is_causal, sm_scale = neutral.settle(
        q, k, tensor_layout, is_causal, sm_scale,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, TRITON_FP16.name)


def sageattn_qk_int8_pv_fp16_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    qk_quant_gran: str = "per_thread", sm_scale: float | None = None, pv_accum_dtype: str = "fp32",
    smooth_k: bool = True, smooth_v: bool = False, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """INT8 QKᵀ and FP16 PV. `pv_accum_dtype`: "fp32", "fp16+fp32" or "fp16"; all three are overflow-safe.

    `qk_quant_gran`, `smooth_k` and `smooth_v` are accepted; the finest granularity is always used.
    """
    return _cuda_variant(
        CUDA_FP16, q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, return_lse, attn_mask,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    qk_quant_gran: str = "per_thread", sm_scale: float | None = None, pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True, smooth_v: bool = False, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """INT8 QKᵀ and FP8 (e4m3) PV, for Ada and Blackwell."""
    return _cuda_variant(
        CUDA_FP8, q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, return_lse, attn_mask,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    qk_quant_gran: str = "per_thread", sm_scale: float | None = None, pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True, return_lse: bool = False,
    *,
    smooth_v: bool = False, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """INT8 QKᵀ and FP8 (e4m3) PV by wgmma, for Hopper."""
    return _cuda_variant(
        CUDA_FP8_SM90, q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, return_lse, attn_mask,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip


def sageattn_qk_int8_pv_int8_cuda(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    qk_quant_gran: str = "per_thread", sm_scale: float | None = None, pv_accum_dtype: str = "int32+fp32",
    smooth_k: bool = True, smooth_v: bool = False, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """Both products in INT8, for cards without FP8."""
    return _cuda_variant(
        CUDA_INT8, q, k, v, tensor_layout, is_causal, qk_quant_gran, sm_scale, pv_accum_dtype, return_lse, attn_mask,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip


def sageattn_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, is_causal: bool = False, sm_scale: float | None = None, smooth_k: bool = True,
    *,
    return_lse: bool = False, lse_layout: str = "HN", variant: str = "auto", pv_accum_dtype: str | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Output:  # fmt: skip
    """Attention over sequences of different lengths, packed along the tokens.

    Args:
        q: [total_q, Hq, D]; k, v: [total_k, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 or int64 [batch + 1], the cumulative lengths, starting with 0. The CUDA variants read them on the
            device alone: they cut off what lies outside the tensors or beyond the longest length, and a CUDA graph can be replayed with
            other offsets. The other variants check a tensor's values when it is first seen, and after it was written to, which waits for
            the GPU.
        max_seqlen_q, max_seqlen_k: the longest sequence's length, or more.
        causal: as `is_causal`; cu_seqlens_q and cu_seqlens_k have to be one tensor.
        lse_layout: of the log-sum-exps, "HN" or "NH".
        variant: as in `sageattn`. "auto" may take PyTorch's own attention for packed sequences, where this release has one. Where nothing
            reads them in place PyTorch computes them one by one, and says so once.

    Returns:
        out [total_q, Hq, D]; with `return_lse` (out, lse fp32 [Hq, total_q] or [total_q, Hq], natural log). A sequence without keys gives
        zeros and log-sum-exps of −inf. Tokens that belong to no sequence are not written by the CUDA variants.
    """
    _check_choice("lse_layout", lse_layout, LSE_LAYOUTS)
    if pv_accum_dtype is not None:
        _check_choice("pv_accum_dtype", pv_accum_dtype, PV_ACCUM_DTYPES)
    is_causal, sm_scale = neutral.settle(
        q, k, "packed", is_causal, sm_scale,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip
    if causal and cu_seqlens_q is not cu_seqlens_k:
        raise Unsupported("causal", f"{neutral.ALIGNMENT}. Of packed sequences pass one tensor for both, where their lengths are equal")
    if is_traced(q):
        from . import torch_library

        untraced = torch_library.compiled_with_grad(q, k, v)
        if return_lse:
            call_operator = torch_library.varlen_lse_untraced if untraced else torch_library.varlen_lse
        else:
            call_operator = torch_library.varlen_untraced if untraced else torch_library.varlen
        result = call_operator(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal, sm_scale, variant, pv_accum_dtype or ""
        )
        out, lse = result if return_lse else (result, None)
    else:
        from . import packed_dispatch

        out, lse = packed_dispatch.compute(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse,
            variant=variant, accum=pv_accum_dtype or "",
        )  # fmt: skip
    if lse is None:
        return out
    return out, lse if lse_layout == "HN" else lse.t()


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None, variant: str = "auto", pv_accum_dtype: str | None = None,
) -> Call:  # fmt: skip
    """`sageattn` in two steps: the call is checked and planned here, its `run()` computes it and gives (out, lse or None).

    `left_to_model` says why "auto" leaves it to PyTorch's attention, so that a program can call its own instead; `run(release)` takes q, k
    and v over: the output is written into q, or k and v are freed on the way, where nobody else has them.
    """
    return _dispatch().prepare(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
        variant=variant, accum=pv_accum_dtype or "",
    )  # fmt: skip


def quantize_kv(
    k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", *, variant: str = "auto", key_mask: torch.Tensor | None = None
) -> QuantizedKV:  # fmt: skip
    """Quantise K and V once; the result owns no float tensor, so the caller may free k and v before `attend`.

    Args:
        key_mask: [B | 1, Nk] bool, False for keys that no query will see, such as padding: what they hold then costs no accuracy.
            `attend` wants an attn_mask that hides them, and may hide more.

    Raises:
        Unsupported: also where the variant that runs keeps no quantised form ("sdpa", "reference").
    """
    return _dispatch().quantize_kv(k, v, tensor_layout, variant, key_mask)


def attend(
    q: torch.Tensor,
    kv: QuantizedKV,
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
) -> Output:
    """Attention of q (in the layout, dtype and on the device of the k and v that were quantised) against a `QuantizedKV`."""
    out, lse = _dispatch().attend(q, kv, is_causal=is_causal, sm_scale=sm_scale, return_lse=return_lse, attn_mask=attn_mask)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class Availability:
    """Whether a variant runs on a device; `status` is "ready", "unsupported" (not on this device) or "missing" (no kernel)."""

    name: str
    summary: str
    status: str
    reason: str = ""


def available_variants(device: torch.device | str | None = None) -> list[Availability]:
    """Every variant, and whether it can run on `device` (default: the current CUDA device, else the CPU) – or why not."""
    import torch

    from .device import capability
    from .kernels import binaries
    from .planning.plan import refusal

    device = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    index = device.index if device.index is not None else torch.cuda.current_device() if device.type == "cuda" else -1
    machine = capability.of_device(device.type, index)
    try:
        forced, malformed = binaries.forced(), None
    except Unsupported as refused:  # a malformed SAGEATTENTION_ARCH: nothing of ours runs, and the list says why
        forced, malformed = (0, False), refused
    found = []
    for variant in VARIANTS.values():
        error = refusal(variant, machine, *forced) or (malformed if variant.has_kernels else None)
        status = "ready" if error is None else "missing" if isinstance(error, KernelMissing) else "unsupported"
        reason = error.reason if error else ""
        if error and device.type == "cpu" and variant.has_kernels and capability.torch_without_cuda():
            reason = f"{reason}; {capability.torch_without_cuda()}"
        found.append(Availability(variant.name, variant.summary, status, reason))
    return found


@dataclass(frozen=True)
class Explanation:
    """Which variant a call gets and why; `rejected` lists the candidates before it, each with its reason.

    `basis` is what an "auto" call's choice rests on: "measured" (a card of the architecture), "static" (its data sheet), "calibrated",
    "verified" (this card) or "" where nothing had to be predicted. `accum` is the `pv_accum_dtype`, "" the variant's default.
    `predicted_ms` has what was expected of each candidate, "sdpa" among them.
    """

    variant: str
    reason: str
    rejected: tuple[tuple[str, str], ...]
    device: str
    basis: str = ""
    accum: str = ""
    predicted_ms: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, plan: Plan) -> Explanation:
        """Of a call that is planned."""
        from .planning.here import machine

        rejected = tuple((str(candidate), reason) for candidate, reason in plan.rejected)
        predicted = {str(candidate): ms for candidate, ms in plan.predicted}
        return cls(plan.variant.name, plan.reason, rejected, machine(problem).name, plan.basis, plan.accum, predicted)

    def _by_time(self) -> list[tuple[str, float]]:
        return sorted(self.predicted_ms.items(), key=lambda item: item[1])

    def __str__(self) -> str:
        accum = f" ({self.accum})" if self.accum else ""
        lines = [f"{self.variant}{accum} on {self.device}: {self.reason}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.rejected]
        if self.predicted_ms:
            lines.append("  expected: " + ", ".join(f"{name} {ms:.3g} ms" for name, ms in self._by_time()))
        return "\n".join(lines)


def explain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str = "HND", is_causal: bool = False,
    sm_scale: float | None = None, return_lse: bool = False,
    *,
    attn_mask: torch.Tensor | None = None, smooth_k: bool = True, variant: str = "auto", qk_quant_gran: str = "per_thread",
    pv_accum_dtype: str | None = None,
    dropout_p: float = 0.0, scale: float | None = None, softmax_scale: float | None = None, causal: bool | None = None,
    enable_gqa: bool = False, window_size: tuple[int, int] | None = None, softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_softmax: bool = False, return_attn_probs: bool = False,
) -> Explanation:  # fmt: skip
    """What `sageattn` would do with this call; nothing runs. Same arguments, same errors."""
    _check_choice("qk_quant_gran", qk_quant_gran, QK_QUANT_GRAN)
    if pv_accum_dtype is not None:
        _check_choice("pv_accum_dtype", pv_accum_dtype, PV_ACCUM_DTYPES)
    is_causal, sm_scale = neutral.settle(
        q, k, tensor_layout, is_causal, sm_scale,
        scale, softmax_scale, causal, dropout_p, enable_gqa, window_size, softcap, alibi_slopes, deterministic,
        return_softmax, return_attn_probs,
    )  # fmt: skip
    try:
        call = _dispatch().prepare(
            q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
            variant=variant, accum=pv_accum_dtype or "",
        )  # fmt: skip
    except TorchOnly as refusal:
        if variant != "auto" or tensor_layout != "HND" or return_lse:
            raise
        return Explanation("sdpa", f"no variant reads it: {refusal}", (), str(q.device))
    return Explanation.of(call.problem, call.plan)


_loaded: ModuleType | None = None


def _dispatch() -> ModuleType:
    """`dispatch`, which imports torch, imported when it is first needed: the statement costs each call that comes past it a microsecond."""
    global _loaded
    if _loaded is None:
        from . import dispatch

        _loaded = dispatch
    return _loaded


def is_traced(q: torch.Tensor) -> bool:
    """Whether the call is only looked at, and has to be one registered operator.

    Under torch.compile nothing of this module's is read: the graph would be guarded by it, and compiled anew once it is set.
    """
    torch = sys.modules.get("torch")
    return torch is not None and (torch.compiler.is_compiling() or _dispatch().traced(q))


def _check_choice(name: str, given: str, accepted: tuple[str, ...]) -> None:
    """A parameter that changes nothing here still has to hold one of upstream's values: a misspelling must not pass."""
    if given not in accepted:
        raise Unsupported(name, f"got {given!r}, accepted are {', '.join(map(repr, accepted))}")


def _by_position(
    fourth: torch.Tensor | None, attn_mask: torch.Tensor | None, dropout_p: float, fifth: object, sixth: object
) -> tuple[torch.Tensor | None, float, bool]:
    """(attn_mask, dropout_p, is_causal) of a call as torch's function takes them, by position after v; nn.MultiheadAttention makes such.

    `fifth` and `sixth` are what our own parameters at those places hold: torch's value, a default of ours or, by keyword, is_causal.
    """
    if fourth is not None and not hasattr(fourth, "shape"):  # a method of tensors torch 2.5's compiler would not find
        raise Unsupported("tensor_layout", f"got {fourth!r}, accepted are 'HND', 'NHD' and, as torch's function has it, an attn_mask")
    if isinstance(fifth, (int, float)) and not isinstance(fifth, bool):
        dropout_p = fifth
    return attn_mask if fourth is None else fourth, dropout_p, fifth is True or sixth is True


def _cuda_variant(
    variant: Variant, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensor_layout: str, is_causal: bool, qk_quant_gran: str,
    sm_scale: float | None, accum: str, return_lse: bool, attn_mask: torch.Tensor | None,
    scale: float | None, softmax_scale: float | None, causal: bool | None, dropout_p: float, *neutral_values: object,
) -> Output:  # fmt: skip
    """What the functions of the CUDA variants have in common: all."""
    if not isinstance(tensor_layout, str):
        attn_mask, dropout_p, is_causal = _by_position(tensor_layout, attn_mask, dropout_p, is_causal, qk_quant_gran)
        tensor_layout = "HND"
    else:
        _check_choice("qk_quant_gran", qk_quant_gran, QK_QUANT_GRAN)
    _check_choice("pv_accum_dtype", accum, tuple(variant.accum))
    is_causal, sm_scale = neutral.settle(
        q, k, tensor_layout, is_causal, sm_scale, scale, softmax_scale, causal, dropout_p, *neutral_values
    )  # fmt: skip
    return _call(q, k, v, tensor_layout, is_causal, sm_scale, return_lse, attn_mask, variant.name, accum)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: torch.Tensor | None,
    variant: str,
    accum: str = "",
) -> Output:
    if is_traced(q):
        from . import torch_library

        if variant == "auto" and tensor_layout == "HND" and not return_lse and not q.dtype == k.dtype == v.dtype:
            # Now: torch.autocast is not at work where the operator runs.
            return torch_library.by_torch_alone(q, k, v, attn_mask, is_causal, sm_scale)
        if torch_library.compiled_with_grad(q, k, v, attn_mask):
            call_operator = torch_library.attention_lse_untraced if return_lse else torch_library.attention_untraced
        else:
            call_operator = torch_library.attention_lse if return_lse else torch_library.attention
        return call_operator(q, k, v, attn_mask, tensor_layout, is_causal, sm_scale, variant, accum)
    out, lse = _dispatch().compute(
        q, k, v, tensor_layout=tensor_layout, is_causal=is_causal, attn_mask=attn_mask, sm_scale=sm_scale, return_lse=return_lse,
        variant=variant, accum=accum,
    )  # fmt: skip
    return (out, lse) if return_lse else out
