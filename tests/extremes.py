"""The property that every variant keeps: finite inputs of any size give finite outputs. For a GPU and for Triton's interpreter."""

from __future__ import annotations

from typing import Any

import matrix
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sageattention import sageattn

NUMBERS = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, 1e-45, -1e-38, 1e-20, 65504.0, 1e30, -1e30, 3e38, -3e38])

# The only key is its own mean; what its rotation is off by, times such a query, is millions below the score 0 of the empty keys behind it.
LONE_KEY = {
    "seed": 0, "sizes": [29883.0, 128525.0, 0.0], "spikes": [0.0, 1.53125, 0.0], "len_q": 1, "len_kv": 1, "head_dim": 40,
    "dtype": "bfloat16", "causal": False,
}  # fmt: skip


def finite_outputs(examples: int, len_q: int, len_kv: int, **options):
    """Decorates a test that takes one call as keywords and hands it to `check`; lengths go up to `len_q` and `len_kv`."""

    def decorate(test):
        drawn = given(
            seed=st.integers(0, 2**31), sizes=st.lists(NUMBERS, min_size=3, max_size=3), spikes=st.lists(NUMBERS, min_size=3, max_size=3),
            len_q=st.integers(1, len_q), len_kv=st.integers(1, len_kv), head_dim=st.sampled_from(matrix.HEAD_DIMS),
            dtype=st.sampled_from(matrix.DTYPES), causal=st.booleans(),
        )(test)  # fmt: skip
        # One key is its own k_mean: nothing averages out of it, and its rotation is as large as it gets.
        for head_dim, dtype, size in ((64, "bfloat16", 3e38), (40, "float32", -3e38), (128, "float32", 2.0**127)):
            drawn = example(
                seed=0, sizes=[1.0, size, 1.0], spikes=[0.0, size, 3e38], len_q=2, len_kv=1, head_dim=head_dim, dtype=dtype, causal=False
            )(drawn)  # fmt: skip
        drawn = example(**LONE_KEY)(drawn)
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(max_examples=examples, deadline=None, suppress_health_check=checks, **options)(drawn)

    return decorate


def tensors(
    *, seed: int, sizes: list[float], spikes: list[float], len_q: int, len_kv: int, head_dim: int, dtype: str, causal: bool
) -> dict[str, torch.Tensor]:
    """q, k and v are uniform in ±size, with one element that is the spike; drawn on the CPU, so that they are the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    limit = torch.finfo(kind).max
    given = {}
    for name, tokens, size, spike in zip("qkv", (len_q, len_kv, len_kv), sizes, spikes):
        t = (torch.rand(1, 2, tokens, head_dim, generator=generator) * 2 - 1) * size
        at = [int(torch.randint(length, (), generator=generator)) for length in (tokens, head_dim)]
        t[..., at[0], at[1]] = spike
        given[name] = t.clamp(-limit, limit).to(kind)
        assert given[name].isfinite().all(), f"the test's own {name}"
    return given


def check(variant: str, device: str, **call: Any) -> None:
    """A call as `tensors` has it."""
    given = tensors(**call)
    out, lse = sageattn(*(t.to(device) for t in given.values()), is_causal=call["causal"], return_lse=True, variant=variant)
    for name, t in (("out", out), ("lse", lse)):
        nan, infinite = int(t.isnan().sum()), int(t.isinf().sum())
        assert not nan + infinite, f"{variant}: {nan} NaN and {infinite} Inf among {t.numel()} elements of {name}; {call}"
