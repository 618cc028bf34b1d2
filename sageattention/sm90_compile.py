"""A marker for programs that look for kernels for Hopper before they use this package there.

SGLang does so by importing one name of upstream's build from this module. Nobody calls it.
"""

from __future__ import annotations

from typing import NoReturn

from .errors import Unsupported


def qk_int8_sv_f8_accum_f32_fuse_v_scale_attn_inst_buf_fake_impl(*arguments: object) -> NoReturn:
    """Only to be found.

    Raises:
        Unsupported: always; the kernel of that name takes upstream's private formats.
    """
    raise Unsupported("arguments", "this function is a marker that there are kernels for Hopper; call sageattn_qk_int8_pv_fp8_cuda_sm90")
