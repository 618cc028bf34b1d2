"""What calls cost where a card of the architecture was timed. Written by csrc/tools/fit_costs.py; docs/kernels.md says how.

By family, by compiled head dimension and kind of mask, by candidate: the fields of `Cost`.
"""

from __future__ import annotations

from ..variants import Candidate
from .cost import Cost, Costs, Kind

MADE_FROM: dict[int, str] = {
    90: "NVIDIA H200, driver 570.124.06, CUDA 12.8, torch 2.11.0+cu130",
}
_ROWS: dict[int, dict[Kind, dict[str, tuple[float, ...]]]] = {
    90: {
        (64, "none"): {
            "sdpa": (5.68, 1.14, 7.1, 24.3, 0, 0, 0, 3.41, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (13.9, 2.7, 2.78, 21.4, 2.14, 0.636, 2.3, 1.41, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (11.8, 2.86, 3.4, 33.5, 1.57, 0, 2.15, 1.49, 0),
            "sageattn_qk_int8_pv_int8_cuda": (14.2, 1.4, 3.75, 40.6, 2.26, 1.27, 2.64, 1.62, 0),
        },
        (64, "causal"): {
            "sdpa": (2.64, 2.94, 6.74, 12.8, 0.637, 2.12, 0.0106, 3.42, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (11, 4.45, 3.88, 11.5, 4.86, 1.91, 0.651, 1.48, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (11, 2.92, 5.61, 10.7, 9.02, 3.58, 0, 1.72, 0),
            "sageattn_qk_int8_pv_int8_cuda": (10.8, 1.7, 7.85, 9.39, 3.61, 5.07, 0, 1.97, 0),
        },
        (64, "keys"): {
            "sdpa": (10.8, 1.5, 0.349, 99.2, 55.5, 1.17, 4.64, 6.4, 3.17),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (15.8, 3.33, 5.48, 0, 1.41, 0.574, 13.8, 1.6, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (13.9, 3.01, 7.4, 0, 2.59, 1.08, 14.3, 1.86, 0),
            "sageattn_qk_int8_pv_int8_cuda": (14.3, 3.72, 9.94, 0, 2.26, 0.961, 22.3, 2.8, 0),
        },
        (64, "bool"): {
            "sdpa": (16.9, 6.41, 12.6, 40, 0, 9.3, 0, 0.867, 128),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (20.8, 0, 4.94, 15.1, 0, 0, 34, 4.54, 99.8),
            "sageattn_qk_int8_pv_fp16_cuda": (19.1, 0, 6.7, 18.3, 0, 0, 32.9, 4.71, 92.6),
            "sageattn_qk_int8_pv_int8_cuda": (40.1, 0, 9.99, 15.9, 0, 0, 26.8, 3.9, 59.7),
        },
        (64, "additive"): {
            "sdpa": (6.03, 2.31, 14.1, 38.7, 28.3, 4.47, 4.82, 3.88, 26.4),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (33.6, 3.15, 21, 79.9, 5.61, 2.48, 11.6, 2.53, 6.05),
            "sageattn_qk_int8_pv_fp16_cuda": (33.9, 1.77, 20.8, 73.2, 8.25, 1.67, 11.6, 2.78, 13.5),
            "sageattn_qk_int8_pv_int8_cuda": (25.4, 1.54, 31.4, 83.4, 6.01, 1.54, 9.8, 3.82, 16.6),
        },
        (128, "none"): {
            "sdpa": (4.4, 1.99, 9.61, 33.8, 0, 0, 0, 3.42, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (15.1, 3.93, 5.48, 19.6, 0, 0.942, 2.83, 1.68, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (11.6, 3.94, 7.91, 13.3, 0, 0, 4.3, 1.52, 0),
            "sageattn_qk_int8_pv_int8_cuda": (14.7, 5.15, 9.61, 35.2, 1.9, 0, 3.72, 2.07, 0),
        },
        (128, "causal"): {
            "sdpa": (8.73, 1.77, 12.4, 6.94, 0.962, 0, 0, 3.6, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (10.3, 8.11, 6.7, 7.71, 1.58, 1.71, 0, 1.72, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (11.2, 6.46, 7.93, 9.4, 6.3, 2.76, 0, 1.76, 0),
            "sageattn_qk_int8_pv_int8_cuda": (7.52, 13.2, 13.5, 7.9, 0, 0, 0, 2.67, 0),
        },
        (128, "keys"): {
            "sdpa": (8.28, 0.533, 10.6, 58.7, 4.4, 1.14, 1.19, 2.78, 72.8),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (29.1, 0, 6.08, 8.36, 9.58, 3.88, 4.67, 2.11, 1.02),
            "sageattn_qk_int8_pv_fp16_cuda": (22.4, 0.927, 4.22, 22.9, 18, 2.9, 7.99, 2.07, 0),
            "sageattn_qk_int8_pv_int8_cuda": (25.9, 0, 13.6, 33.8, 12.6, 4.3, 3.58, 2.86, 0),
        },
        (128, "bool"): {
            "sdpa": (11.9, 0, 25.7, 15.5, 0, 1.76, 0.807, 3.02, 153),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (36.1, 0, 0.765, 84.1, 5.79, 3.46, 10.7, 2.23, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (34.4, 0.793, 0.539, 97.6, 9.69, 2.65, 10.2, 1.99, 0),
            "sageattn_qk_int8_pv_int8_cuda": (37.8, 0.997, 0, 233, 15.3, 2.7, 8.06, 0, 0),
        },
        (128, "additive"): {
            "sdpa": (3.55, 1.27, 19.3, 34.3, 9.67, 0.766, 3.21, 1.23, 471),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (24.2, 2.42, 26.7, 90.9, 5.6, 0.659, 8.86, 2.29, 704),
            "sageattn_qk_int8_pv_fp16_cuda": (37.9, 1.38, 36.1, 0, 10.3, 0.858, 0, 1.71, 240),
            "sageattn_qk_int8_pv_int8_cuda": (27.7, 5.44, 29.1, 101, 6.82, 4.31, 10.9, 2.64, 111),
        },
        (256, "none"): {
            "sdpa": (5.62, 2.34, 8.62, 3.73, 29.5, 0, 0.616, 3.04, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (12.1, 6.46, 26, 26.1, 8.15, 7.1, 3.22, 2.41, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (9.18, 3.27, 28.2, 23.5, 1.72, 4.07, 3.29, 1.82, 0),
            "sageattn_qk_int8_pv_int8_cuda": (14, 12.3, 24.1, 13.8, 0, 0.804, 3.73, 2.89, 0),
        },
        (256, "causal"): {
            "sdpa": (4.25, 1.46, 17.2, 11.3, 8.42, 0.684, 1.05, 2.96, 0),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (51.7, 6.57, 23.2, 27.8, 7.54, 3.51, 6.67, 3.21, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (48, 4.49, 30.4, 23.6, 3.62, 4.1, 0, 2.75, 0),
            "sageattn_qk_int8_pv_int8_cuda": (52.3, 6.45, 22.7, 24.8, 3.87, 4.45, 0, 2.82, 0),
        },
        (256, "keys"): {
            "sdpa": (1.88, 1.01, 22.1, 22.3, 17.3, 0.946, 1.95, 2.96, 538),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (87.3, 6.21, 43.8, 46, 12.6, 2.35, 0.296, 4.38, 200),
            "sageattn_qk_int8_pv_fp16_cuda": (64.5, 6.37, 29.8, 14.8, 4.75, 1.44, 2.28, 3.8, 0),
            "sageattn_qk_int8_pv_int8_cuda": (65, 7.83, 26.6, 17.1, 5.47, 3.15, 2.35, 4.19, 20.3),
        },
        (256, "bool"): {
            "sdpa": (4.98, 2.24, 32.1, 41.5, 12.3, 3.05, 0, 5.36, 187),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (39.2, 7.32, 20.9, 79.7, 9.27, 5.82, 20.2, 4.38, 109),
            "sageattn_qk_int8_pv_fp16_cuda": (23.8, 4.31, 13.6, 47, 8.2, 3.49, 14.2, 2.58, 73.3),
            "sageattn_qk_int8_pv_int8_cuda": (25.7, 4.44, 9.27, 44.4, 5.68, 3.62, 17.6, 2.67, 93.5),
        },
        (256, "additive"): {
            "sdpa": (5.65, 2.26, 29.8, 38.4, 26.9, 4.44, 4.44, 5.57, 148),
            "sageattn_qk_int8_pv_fp8_cuda_sm90": (35.9, 8.11, 52.6, 168, 11.1, 6.53, 15, 5.13, 0),
            "sageattn_qk_int8_pv_fp16_cuda": (30.6, 6.11, 36.3, 110, 11.5, 4.84, 12, 3.64, 80),
            "sageattn_qk_int8_pv_int8_cuda": (34.7, 6.93, 35, 122, 8.73, 5.47, 13.5, 4.13, 123),
        },
    },
}  # fmt: skip
MEASURED: dict[int, Costs] = {
    arch: {kind: {Candidate.parse(name): Cost(*row) for name, row in rows.items()} for kind, rows in kinds.items()}
    for arch, kinds in _ROWS.items()
}
