"""A block whose keys are shared out to two CTAs gives nearly what one gives alone: where the cut lies follows from the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sageattention.cli import workloads
from sageattention.numerics import reference
from sageattention.numerics.scheme import FP8_FP32_WGMMA

ROWS = reference.LAZY_ROWS
SHAPE = workloads.Shape("a block of queries", 1, 1, ROWS, 3072, 128)
BOUND = 0.004


@pytest.mark.parametrize("kind", ["normal", "heavy_tailed", "logits6", "sink", "video"])
@pytest.mark.parametrize("tiles", [1, 11, 16])
def test_where_a_block_is_cut_does_not_matter(kind: str, tiles: int) -> None:
    q, k, v = (t[0, 0] for t in workloads.make(kind, workloads.KINDS[kind].sized(replace(SHAPE, len_kv=3072))))
    q, scheme = q[:ROWS], FP8_FP32_WGMMA
    keys, values = reference.quantize_k(k, scheme), reference.quantize_v(v, scheme)
    tokens, rows = len(k), range(ROWS)
    steps = reference._lazy_steps(rows, tokens, q.shape[1], scheme, None, False)

    def attend(steps: list[reference._Step]) -> tuple[torch.Tensor, torch.Tensor]:
        return reference._attend_rows(q, rows, keys, values, scheme, None, False, q.shape[1] ** -0.5, steps)

    cut = tokens - tiles * scheme.kv_tile  # full tiles are walked from the last one
    parts = []
    for own in ([s for s in steps if s.start >= cut], [s for s in steps if s.start < cut]):
        first = own[0].start // scheme.kv_tile
        begins = [not s.lines or (s.start % scheme.kv_tile == 0 and (first - s.start // scheme.kv_tile) % 2 == 0) for s in own]
        parts.append(attend([s._replace(begins=b) for s, b in zip(own, begins)]))
    (first_out, first_lse), (second_out, second_lse) = parts
    share = torch.sigmoid(first_lse - second_lse)[:, None]
    whole = attend(steps)[0]
    assert workloads.relative_l2(share * first_out + (1 - share) * second_out, whole) <= BOUND
