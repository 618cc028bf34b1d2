"""The public functions by the module where upstream has them: programs import them from `sageattention.core`, too.

Upstream's quantisers, which a few programs also import from there, have no counterpart: their formats are private.
"""

from .api import (
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_qk_int8_pv_int8_cuda,
    sageattn_varlen,
    scaled_dot_product_attention,
)

__all__ = [
    "sageattn",
    "sageattn_qk_int8_pv_fp8_cuda",
    "sageattn_qk_int8_pv_fp8_cuda_sm90",
    "sageattn_qk_int8_pv_fp16_cuda",
    "sageattn_qk_int8_pv_fp16_triton",
    "sageattn_qk_int8_pv_int8_cuda",
    "sageattn_varlen",
    "scaled_dot_product_attention",
]
