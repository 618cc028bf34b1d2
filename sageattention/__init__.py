"""Quantised attention with kernels of its own. Importing touches neither torch nor CUDA, and never raises."""

from ._version import __version__
from .api import (
    Availability,
    Explanation,
    attend,
    available_variants,
    explain,
    prepare,
    quantize_kv,
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_qk_int8_pv_int8_cuda,
    sageattn_varlen,
    scaled_dot_product_attention,
)
from .errors import CudaError, KernelMissing, Unsupported
from .sparse import sageattn_sparse

__all__ = [
    "Availability",
    "CudaError",
    "Explanation",
    "KernelMissing",
    "Unsupported",
    "__version__",
    "attend",
    "available_variants",
    "explain",
    "prepare",
    "quantize_kv",
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_int8_cuda",
    "sageattn_sparse",
    "sageattn_varlen",
    "scaled_dot_product_attention",
]
