"""What the public functions are called with: names, order, defaults; what they raise."""

from __future__ import annotations

import inspect

import pytest

torch = pytest.importorskip("torch")

from api_calls import CUDA_FUNCTIONS, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import CudaError, KernelMissing, Unsupported, sageattn  # noqa: E402
from sageattention.variants import VARIANTS  # noqa: E402

GRANULAR = ("tensor_layout", "is_causal", "qk_quant_gran", "sm_scale", "pv_accum_dtype", "smooth_k", "smooth_v", "return_lse")
POSITIONAL = {
    "sageattn": ("tensor_layout", "is_causal", "sm_scale", "return_lse"),
    "sageattn_qk_int8_pv_fp16_triton": (
        "tensor_layout", "quantization_backend", "is_causal", "attn_mask", "sm_scale", "smooth_k", "return_lse",
    ),
    **dict.fromkeys(CUDA_FUNCTIONS, GRANULAR),
    "sageattn_qk_int8_pv_fp8_cuda_sm90": tuple(name for name in GRANULAR if name != "smooth_v"),
    "sageattn_varlen": (
        "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "is_causal", "sm_scale", "smooth_k",
    ),
    "explain": ("tensor_layout", "is_causal", "sm_scale", "return_lse"),
}  # fmt: skip


def test_comfyui_finds_attn_mask():
    assert "attn_mask" in inspect.signature(sageattn).parameters


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_order_is_upstream_s(name):
    parameters = inspect.signature(getattr(sageattention, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == ["q", "k", "v", *POSITIONAL[name]]
    assert not any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters)


@pytest.mark.parametrize("name", [n for n in POSITIONAL if n != "sageattn_varlen"])
def test_every_function_takes_a_mask(name):
    assert "attn_mask" in inspect.signature(getattr(sageattention, name)).parameters


@pytest.mark.parametrize("name", POSITIONAL)
def test_unknown_keyword(name):
    offsets = {n: None for n in POSITIONAL[name][:4]} if name == "sageattn_varlen" else {}
    with pytest.raises(TypeError, match="sm_scales"):
        getattr(sageattention, name)(*qkv(), sm_scales=1.0, **offsets)


def test_everything_public_is_exported():
    assert all(hasattr(sageattention, name) for name in sageattention.__all__)
    assert {*POSITIONAL, "quantize_kv", "attend", "available_variants"} <= set(sageattention.__all__)
    assert torch.torch_version.TorchVersion(sageattention.__version__) >= (2, 1, 1)  # what diffusers asks for


@pytest.mark.parametrize("name", CUDA_FUNCTIONS)
def test_a_variant_by_name_is_its_function_s_default(name):
    """`variant=name`, as the node says it, and the function of that name round alike."""
    default = inspect.signature(CUDA_FUNCTIONS[name]).parameters["pv_accum_dtype"].default
    assert next(iter(VARIANTS[name].accum)) == default and VARIANTS[name].accum[default] == VARIANTS[name].scheme
    assert all(default in kernels.schemes for kernels in VARIANTS[name].kernels)


def test_errors():
    assert issubclass(Unsupported, ValueError)
    assert issubclass(KernelMissing, RuntimeError) and issubclass(CudaError, RuntimeError)
    assert not issubclass(KernelMissing, CudaError) and not issubclass(CudaError, KernelMissing)
