"""How calls of packed sequences are cut into groups: within the workspace, however many sequences there are and however long."""

from __future__ import annotations

import pytest

from sageattention.device.capability import Capability
from sageattention.numerics.constants import HEAD_DIMS
from sageattention.planning.packed import MAX_RUN_KEYS, MAX_RUNS, MIN_RUN_KEYS, PackedProblem, group_bytes, packed_shape
from sageattention.planning.plan import CudaPlan, Target, fit_cuda
from sageattention.planning.problem import Problem
from sageattention.variants import VARIANTS, Variant

CUDA = [v for v in VARIANTS.values() if v.backend == "cuda"]
BLOCKS = 264  # that quantise K at a time


def planned(
    monkeypatch: pytest.MonkeyPatch, variant: Variant, batch: int, longest: int, total: int, heads: int, head_dim: int
) -> tuple[PackedProblem, CudaPlan]:  # fmt: skip
    monkeypatch.setattr("sageattention.kernels.store.missing", lambda image: "")
    problem = Problem(batch, heads, heads, longest, longest, head_dim, "bfloat16", "cuda", 0, "NHD", varlen=True)
    return PackedProblem(problem, total, total), fit_cuda(
        problem, Target(Capability("cuda", 90, 132, "none", "H200")), variant, "", "a test"
    )


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("variant", CUDA, ids=lambda v: v.name)
@pytest.mark.parametrize(
    "batch, longest, total, heads, whole",
    [
        (4, 512, 1500, 8, True),
        (2, 32768, 65536, 24, False),
        (4096, 300, 4096 * 300, 20, False),
        (4096, 700, 4096 * 400, 20, False),
        (1001, 65536, 65536 + 1000 * 77, 20, False),
        (1, 1, 1, 1, True),
    ],
)
def test_groups_fit_and_hold_what_they_have_to(
    monkeypatch: pytest.MonkeyPatch, variant: Variant, head_dim: int, batch: int, longest: int, total: int, heads: int, whole: bool
) -> None:
    packed, plan = planned(monkeypatch, variant, batch, longest, total, heads, head_dim)
    shape = packed_shape(packed, plan, BLOCKS)
    one = shape.sequences == batch and shape.heads == heads
    assert one or not whole
    assert shape.alive * group_bytes(shape, plan) <= CudaPlan.WORKSPACE_LIMIT
    assert 1 <= shape.sequences <= batch and 1 <= shape.heads <= heads
    # The longest sequence has room, and so have all tokens if they are in one group.
    for most, tokens in ((shape.q_blocks, plan.tile.block_m), (shape.kv_tiles, plan.tile.block_n), (shape.runs, shape.run_keys)):
        assert most >= -(-longest // tokens)
        if shape.sequences == batch:
            assert most >= total // tokens
    assert shape.run_keys % plan.tile.block_n == 0 and shape.run_keys >= MIN_RUN_KEYS
    assert -(-longest // shape.run_keys) <= MAX_RUNS
    assert shape.run_keys < MAX_RUN_KEYS + plan.tile.block_n or longest > MAX_RUNS * MAX_RUN_KEYS


def test_heads_are_split_before_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch with few heads of all sequences is bounded by their tokens; one with few sequences by the longest, be they short or not."""
    packed, plan = planned(monkeypatch, VARIANTS["sageattn_qk_int8_pv_fp8_cuda_sm90"], 1001, 65536, 65536 + 1000 * 77, 20, 128)
    shape = packed_shape(packed, plan, BLOCKS)
    assert (shape.sequences, shape.heads, shape.alive) == (1001, 1, 1)
    packed, plan = planned(monkeypatch, VARIANTS["sageattn_qk_int8_pv_fp8_cuda_sm90"], 2, 32768, 65536, 24, 128)
    shape = packed_shape(packed, plan, BLOCKS)
    assert (shape.sequences, shape.alive) == (2, 2) and 1 < shape.heads < 24
    packed, plan = planned(monkeypatch, VARIANTS["sageattn_qk_int8_pv_fp8_cuda_sm90"], 4096, 300, 4096 * 300, 20, 128)
    shape = packed_shape(packed, plan, BLOCKS)
    assert shape.heads == 20 and shape.sequences < 4096


def test_one_head_of_the_longest_sequence_is_taken_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, plan = planned(monkeypatch, VARIANTS["sageattn_qk_int8_pv_fp16_cuda"], 3, 1 << 20, 3 << 20, 2, 128)
    shape = packed_shape(packed, plan, BLOCKS)
    assert (shape.sequences, shape.heads) == (1, 1) and group_bytes(shape, plan) > CudaPlan.WORKSPACE_LIMIT
