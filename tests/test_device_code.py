"""The CUDA variant's device code without a GPU: csrc/block and csrc/kernel compiled for the host, with the PTX primitives emulated lane
by lane (tests/lanes), driven by the package's own host side. Each architecture with its own tiles and copies.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import matrix
import pytest
import torch

from sageattention import cuda_ops, driver, images, ops, store
from sageattention.capability import Capability
from sageattention.plan import WORKSPACE_LIMIT, plan
from sageattention.problem import Problem
from sageattention.reference import emulate, oracle
from sageattention.variants import CUDA_FP16, IMAGES, MMA_FP16

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") if sys.platform == "linux" else None
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++ on Linux")

TARGETS = {75: "sm_75", 80: "sm_80", 90: "sm_90a"}
SHARED = "extern __shared__ __align__(128) u8 stages[];"


class Lanes:
    """A card that runs on the host: an architecture's kernels of one head dimension."""

    def __init__(self, arch: int, head_dim: int, folder: Path):
        self.capability, self.head_dim = Capability("cuda", arch, 2, "none", "host"), head_dim
        wanted = MMA_FP16.attend_image(head_dim), MMA_FP16.quantiser
        chosen = [e for i in IMAGES if i.arch == TARGETS[arch] and i.name in wanted for e in i.entries if f"_d{head_dim}" in e.symbol]
        self.entries = {entry.symbol: entry for entry in chosen}
        self.library = ctypes.CDLL(str(self._build(arch, folder)))

    def _build(self, arch: int, folder: Path) -> Path:
        shutil.copytree(ROOT / "tests" / "lanes", folder, dirs_exist_ok=True)
        for part in ("block", "kernel"):
            (folder / part).mkdir()
            for source in (ROOT / "csrc" / part).glob("*.cuh"):
                (folder / part / source.name).write_text(source.read_text().replace(SHARED, "u8* stages = dynamic_shared;"))
        functions = "".join(
            f'extern "C" void {e.symbol}(const {e.params.__name__}* p, unsigned blocks) '
            f"{{ run_grid(blocks, {e.threads}, [&] {{ {e.expression}(*p); }}); }}\n"
            for e in self.entries.values()
        )
        unit = folder / "unit.cpp"
        unit.write_text(
            f'#include "block.h"\n#include "kernel/quantise.cuh"\n#include "kernel/attend_mma.cuh"\nnamespace sage {{\n{functions}}}\n'
        )
        library = folder / "lanes.so"
        options = ("-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", f"-DARCH={arch}", f"-I{folder}")
        subprocess.run([COMPILER, *options, str(unit), "-o", str(library)], check=True)
        return library

    def launch(self, device: int, stream: int, launches: tuple) -> None:
        for symbol, x, _, _, params, _ in launches:
            assert len(params) == ctypes.sizeof(self.entries[symbol].params)
            getattr(self.library, symbol)(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(x))


@pytest.fixture(scope="module", params=[(75, 128), (80, 256), (90, 64), (90, 128)], ids=lambda p: f"sm{p[0]}-d{p[1]}")
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return Lanes(*request.param, tmp_path_factory.mktemp("lanes"))


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    monkeypatch.delenv(images.FORCE, raising=False)
    monkeypatch.setattr(store, "missing", lambda image: "")
    monkeypatch.setattr(cuda_ops, "_recipes", {})
    monkeypatch.setattr(cuda_ops.capability, "of_device", lambda *_: lanes.capability)
    monkeypatch.setattr(driver, "kernel", lambda index, image, symbol, variant: symbol)
    monkeypatch.setattr(cuda_ops, "_issue", lambda device, chains: [lanes.launch(device, 0, chain) for chain in chains])
    return lanes


def run(card: Lanes, tensors: dict[str, torch.Tensor], mask: torch.Tensor | None, accum: str, **options) -> tuple:
    problem = Problem.from_tensors(**tensors, attn_mask=mask, return_lse=True, **options)._replace(device="cuda", device_index=0)
    plan.cache_clear()  # other tests may have planned without images
    chosen = plan(problem, card.capability, CUDA_FP16.name, accum, arch=card.capability.arch)
    out, lse = cuda_ops.run(ops.Call(*tensors.values(), ops._four_dims(mask), problem, chosen))
    return out, lse, chosen.scheme


@pytest.mark.parametrize("accum", ["fp32", "fp16+fp32"])
@pytest.mark.parametrize(
    "mask, dtype, layout, heads, lengths",
    [
        ("none", "bfloat16", "HND", (2, 1), (33, 129)),
        ("causal", "float16", "NHD", (1, 1), (150, 150)),
        ("causal+bool", "float32", "HND", (2, 2), (40, 70)),
        ("additive", "bfloat16", "NHD", (1, 1), (20, 200)),
        ("row", "float16", "HND", (2, 1), (1, 65)),
    ],
)
def test_kernels_agree_with_the_emulation(
    card: Lanes, mask: str, dtype: str, layout: str, heads: tuple, lengths: tuple, accum: str
) -> None:
    head_dim = card.head_dim - 24  # padded inside the kernels
    t, given_mask = matrix.tensors(matrix.Case(head_dim, dtype, layout, mask, *heads, *lengths))
    given = t if layout == "HND" else {name: x.transpose(1, 2).contiguous() for name, x in t.items()}
    causal = "causal" in mask
    out, lse, scheme = run(card, given, given_mask, accum, tensor_layout=layout, is_causal=causal)
    out = out if layout == "HND" else out.transpose(1, 2)
    expected, expected_lse = emulate(**t, scheme=scheme, is_causal=causal, attn_mask=given_mask)
    exact, exact_lse = oracle(**t, is_causal=causal, attn_mask=given_mask)
    assert out.isfinite().all()
    assert matrix.inputs.relative_l2(out, expected) <= 2e-3 + matrix.OUTPUT_STEP[dtype]
    assert matrix.inputs.relative_l2(out, exact) <= 0.05
    masked = exact_lse == -torch.inf
    assert (out[masked] == 0).all() and (lse[masked] == -torch.inf).all()
    assert (lse - expected_lse)[~masked].abs().mean() <= 2e-3


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e4, 1e30, 3.38e38])
def test_any_finite_input_gives_finite_output(card: Lanes, size: float) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (((torch.rand(1, 1, n, card.head_dim, generator=g) * 2 - 1) * size).bfloat16() for n in (20, 70, 70))
    k[0, 0, 3, 5] = v[0, 0, 9, 1] = 3.38e38
    out, lse, _ = run(card, {"q": q, "k": k, "v": v}, None, "fp32")
    assert out.isfinite().all() and lse.isfinite().all()


def test_groups_of_heads_and_halves_give_the_same_bits(card: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    t, _ = matrix.tensors(matrix.Case(card.head_dim, heads_q=4, heads_kv=2, len_q=20, len_kv=100))
    whole = run(card, t, None, "fp32")
    monkeypatch.setitem(WORKSPACE_LIMIT, "cuda", 2 * 2 * MMA_FP16.tile_bytes(card.head_dim))  # of the four pairs, one a group
    monkeypatch.setattr(cuda_ops, "_recipes", {})
    parts = run(card, t, None, "fp32")
    (recipe,) = cuda_ops._recipes.values()
    assert recipe.groups == ((0, 1), (1, 1), (2, 1), (3, 1))
    assert torch.equal(parts[0], whole[0]) and torch.equal(parts[1], whole[1])
    monkeypatch.setattr(driver, "launch", card.launch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)
    problem = Problem.from_tensors(**t, return_lse=True)._replace(device="cuda", device_index=0)
    kv = cuda_ops.quantize(t["k"], t["v"], problem, plan(problem, card.capability, CUDA_FP16.name, arch=card.capability.arch))
    halves = cuda_ops.attend_all(t["q"], kv, problem, None)
    assert torch.equal(halves[0], whole[0]) and torch.equal(halves[1], whole[1])
