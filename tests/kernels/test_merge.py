"""The kernel that merges two parts of one attention: compiled for the host and run lane by lane."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_card import needs_compiler
from lane_compiler import compiled

from sageattention.backends.cuda import driver, lone, merge
from sageattention.kernels.table import MERGE_ATTENTION

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    e = MERGE_ATTENTION
    function = (
        f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) '
        f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
    )
    return compiled(90, tmp_path_factory.mktemp("merge"), ("kernel/merge_attention.cuh",), function)


@pytest.fixture
def card(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(device: int, stream: int, launches: tuple) -> None:
        for symbol, x, _, _, params, _ in launches:
            getattr(library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))

    monkeypatch.setattr(lone, "kernel", lambda index, entry: entry.symbol)
    monkeypatch.setattr(lone.torch_internals, "current_stream", lambda index: 0)
    monkeypatch.setattr(driver, "launch", launch)


@pytest.mark.parametrize("head_dim", [8, 37, 64, 100, 128, 200, 256])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_merged_parts(card: None, dtype: torch.dtype, layout: str, head_dim: int) -> None:
    shape = (2, 3, 11, head_dim) if layout == "HND" else (2, 11, 3, head_dim)
    wide = [torch.randn(*shape[:-1], head_dim + 9).to(dtype)[..., :head_dim] for _ in range(2)]
    for out, other in (wide, [t.contiguous() for t in wide]):
        lse, other_lse = torch.randn(2, 2, 3, 11).mul(5).unbind()
        lse[0, 1, 4] = other_lse[1, 2, 3] = lse[0, 0, 0] = other_lse[0, 0, 0] = -torch.inf
        by_heads = [t if layout == "HND" else t.transpose(1, 2) for t in (out, other)]
        shares = torch.stack((lse, other_lse)).softmax(0).nan_to_num(0)[..., None].double()
        empty = torch.zeros(2, 3, 11, dtype=torch.bool)
        empty[0, 0, 0] = True
        expected = (by_heads[0] * shares[0] + by_heads[1] * shares[1]).to(dtype)
        expected[empty] = by_heads[0][empty]
        whole = torch.logaddexp(lse, other_lse)
        assert merge.merge(out, lse, other, other_lse, layout)
        torch.testing.assert_close(by_heads[0], expected)
        torch.testing.assert_close(lse, whole, rtol=1e-5, atol=1e-5)


def test_what_the_kernel_cannot_do_is_left_alone(card: None) -> None:
    lse = torch.zeros(1, 1, 4)
    for out in (torch.zeros(1, 1, 4, 8, dtype=torch.float64), torch.zeros(1, 1, 4, 300), torch.zeros(1, 1, 8, 4).mT):
        assert not merge.merge(out, lse, out.clone(), lse, "HND")
