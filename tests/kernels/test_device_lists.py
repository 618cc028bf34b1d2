"""Tile lists in the device code, without a GPU: what the pre-pass writes for a mask, and attention by lists that no mask gives."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import matrix
import pytest
import tile_bits
import torch
from emulated_card import CARDS, Lanes, each_variant, install, lanes_of, needs_compiler, on_card
from lane_compiler import compiled

from sageattention.backends.call import PreparedCall
from sageattention.backends.cuda import host
from sageattention.device.capability import Capability
from sageattention.kernels.family import Tile
from sageattention.kernels.params import ClassifyParams
from sageattention.kernels.table import CLASSIFY
from sageattention.numerics.live_keys import reachable
from sageattention.numerics.reference import emulate, oracle
from sageattention.planning.plan import plan
from sageattention.planning.problem import Problem
from sageattention.variants import CUDA_FP16, VARIANTS

pytestmark = needs_compiler
FILLER = 0xAA  # of memory that the pre-pass has not written
CLASSIFY_FUNCTION = f"""
extern "C" void classify(const ClassifyParams* p, unsigned blocks) {{
  run_grid(blocks, {CLASSIFY.threads}, [&] {{ {CLASSIFY.expression}(*p); }});
}}
"""


@pytest.fixture(scope="module")
def classify(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return compiled(90, tmp_path_factory.mktemp("classify"), ("common/warp.cuh", "kernel/classify_mask.cuh"), CLASSIFY_FUNCTION)


def classified(
    library: ctypes.CDLL, mask: torch.Tensor, len_q: int, len_kv: int, tile: int, is_causal: bool, v_ones: bool = False
) -> torch.Tensor:
    """What the pre-pass writes for a mask of one (batch, head) or more, uint8."""
    heads = max(mask.shape[1], 2)
    q, kv = torch.zeros(mask.shape[0], heads, len_q, 64), torch.zeros(mask.shape[0], heads, len_kv, 64)
    problem = Problem.from_tensors(q, kv, kv, attn_mask=mask, is_causal=is_causal)
    launch_plan = SimpleNamespace(
        problem=problem, len_kv=reachable(len_q, len_kv, is_causal), classify="classify", plan=SimpleNamespace(tile=Tile(128, tile, 4, 2))
    )
    lists = host._lists(launch_plan, mask, mask.data_ptr() % 16, v_ones)
    space = torch.full((lists.size,), FILLER, dtype=torch.uint8)
    _, blocks, *_, params, _ = host._classify_launch(launch_plan, lists, mask.data_ptr(), space.data_ptr())
    library.classify(ctypes.create_string_buffer(params, len(params)), ctypes.c_uint(blocks))
    return space


def mask_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Rows without a key, all keys, runs and single ones; biases of which some are negligible."""
    g = torch.Generator().manual_seed(seed)
    runs = torch.rand(*shape[:3], -(-shape[3] // 40), generator=g).repeat_interleave(40, 3)[..., : shape[3]]
    kept = (runs < 0.6) & (torch.rand(shape, generator=g) < 0.99)
    kept[:, :, ::7], kept[:, :, 3::7] = True, False
    if dtype == torch.bool:
        return kept
    bias = torch.where(torch.rand(*shape[:3], 1, generator=g) < 0.3, torch.randn(shape, generator=g), torch.zeros(shape))
    bias[:, :, ::2, 5::64] = -5e3
    return bias.masked_fill(~kept, -torch.inf).to(dtype)


DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("len_q, len_kv, tile", [(70, 333, 64), (33, 288, 96), (1, 1, 128), (129, 2100, 128), (64, 64, 64)])
@pytest.mark.parametrize("shape", ["keys", "batch keys", "dense", "heads", "batch heads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pre_pass(classify: ctypes.CDLL, dtype: torch.dtype, shape: str, len_q: int, len_kv: int, tile: int, is_causal: bool) -> None:
    if len_kv > 2000 and shape not in ("keys", "dense"):
        shape = "dense"
    sizes = {"keys": (1, 1, 1), "batch keys": (2, 1, 1), "dense": (1, 1, len_q), "heads": (1, 2, len_q), "batch heads": (2, 2, len_q)}
    mask = mask_of(dtype, (*sizes[shape], len_kv))
    expected = tile_bits.classify(mask, len_q, reachable(len_q, len_kv, is_causal), tile, is_causal)
    assert torch.equal(classified(classify, mask, len_q, len_kv, tile, is_causal), expected.words(FILLER))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["odd rows", "every second key", "transposed", "expanded", "one key for all"])
def test_pre_pass_reads_any_strides(classify: ctypes.CDLL, view: str, dtype: torch.dtype) -> None:
    wide = mask_of(dtype, (2, 2, 70, 411))
    mask = {
        "odd rows": wide[..., 1:334],
        "every second key": wide[..., ::2],
        "transposed": wide[..., :70].mT,
        "expanded": wide[:1, :, :1, :200].expand(2, 2, 70, 200),
        "one key for all": wide[..., :1].expand(2, 2, 70, 100),
    }[view]
    len_q, len_kv = mask.shape[2:]
    expected = tile_bits.classify(mask, len_q, len_kv, 64, False)
    assert torch.equal(classified(classify, mask, len_q, len_kv, 64, False), expected.words(FILLER))


@pytest.mark.parametrize("tokens, tile", [(333, 96), (4500, 64), (8300, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_make_no_tile_uneven_where_they_are_absent(classify: ctypes.CDLL, dtype: torch.dtype, tokens: int, tile: int) -> None:
    """And neither do keys beyond the end; biases do. Long rows are classified by several CTAs."""
    mask = mask_of(dtype, (2, 1, 2, tokens))[:, :, 1:].contiguous()
    if dtype != torch.bool:
        mask[..., 70:75] = 1.5
    bits = tile_bits.classify(mask, 20, tokens, tile, False)
    biased = (mask != 0) & (mask != -torch.inf) if dtype != torch.bool else torch.zeros_like(mask)
    uneven = tile_bits.by_tiles(biased, tile, 1, False).any(-1)
    assert (bits.uneven & ~uneven).any() and uneven.any() == (dtype != torch.bool)
    assert torch.equal(classified(classify, mask, 20, tokens, tile, False), bits.words(FILLER))
    assert torch.equal(classified(classify, mask, 20, tokens, tile, False, v_ones=True), replace(bits, uneven=uneven).words(FILLER))


class Launches:
    """Takes launches and runs none: the parameters of the pre-pass."""

    def __init__(self):
        self.capability = Capability("cuda", 90, 132, "none", "host")
        self.classify: list[ClassifyParams] = []

    def launch(self, device: int, stream: int, launches: tuple) -> None:
        self.classify += [ClassifyParams.from_buffer_copy(given[4]) for given in launches if given[0] == "classify_mask"]


@pytest.mark.parametrize(
    "rows, is_causal, absent",
    [(1, False, True), (24, False, False), (1, True, False), (24, True, False)],
    ids=["key", "dense", "causal", "both"],
)
def test_only_a_mask_that_is_the_same_for_all_queries_is_left_to_absent_keys(monkeypatch, rows: int, is_causal: bool, absent: bool) -> None:
    """Also where all queries are in one band."""
    card = install(monkeypatch, Launches())
    q, k, mask = torch.randn(2, 4, 24, 40).half(), torch.randn(2, 4, 77, 40).half(), torch.rand(2, 1, rows, 77) > 0.3
    problem = on_card({"q": q, "k": k, "v": k, "attn_mask": mask}, is_causal=is_causal)
    host.run(PreparedCall(q, k, k, mask, problem, plan(problem, card.capability, CUDA_FP16.name), {}))
    assert [bool(given.absent) for given in card.classify] == [absent]


@pytest.mark.parametrize("lowest", [-1e4, torch.finfo(torch.float32).min])
def test_a_row_of_finite_biases_sees_every_key(classify: ctypes.CDLL, lowest: float) -> None:
    mask = torch.zeros(1, 1, 40, 200)
    mask[..., 128:] = lowest
    plain = tile_bits.classify(mask, 40, 200, 64, False)
    assert plain.seen.all() and not plain.live[..., 128:].any()
    mask[:, :, 5] = lowest
    found = tile_bits.classify(mask, 40, 200, 64, False)
    assert found.live[:, :, 0].all() and not found.live[:, :, 1, 128:].any()
    assert torch.equal(classified(classify, mask, 40, 200, 64, False), found.words(FILLER))


@pytest.fixture(scope="module", params=CARDS, ids=lambda p: f"sm{p[0]}-d{p[1]}")
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lanes:
    return lanes_of(*request.param, tmp_path_factory.mktemp("lanes"))


@pytest.fixture
def card(lanes: Lanes, monkeypatch: pytest.MonkeyPatch) -> Lanes:
    return install(monkeypatch, lanes)


@each_variant
@pytest.mark.parametrize("lengths", [(150, 333), (40, 64), (130, 256)], ids=str)
@pytest.mark.parametrize("kind", tile_bits.KINDS)
def test_attention_by_any_list(card: Lanes, kind: str, lengths: tuple[int, int], variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if card.capability.arch < VARIANTS[variant].min_arch:
        pytest.skip(f"{variant} is not for sm_{card.capability.arch}")
    t, _ = matrix.tensors(matrix.Case(card.head_dim, heads_q=2, heads_kv=1, len_q=lengths[0], len_kv=lengths[1]))
    t = {name: x[:1] for name, x in t.items()}
    mask = torch.ones(1, 2, *lengths, dtype=torch.bool)
    problem = on_card(t, attn_mask=mask)
    chosen = plan(problem, card.capability, variant, arch=card.capability.arch)
    bits, pairs = tile_bits.made_up(kind, *lengths, 2, chosen.tile.block_m, chosen.tile.block_n)
    tile_bits.install(monkeypatch, bits)
    kv = host.quantize(t["k"], t["v"], problem, chosen, mask)
    out, lse = host.attend(t["q"], kv, problem, mask)
    exact, exact_lse = oracle(**t, attn_mask=pairs)
    nothing = ~pairs.any(-1)
    assert (out[nothing] == 0).all() and (lse[nothing] == -torch.inf).all()
    if nothing.all():
        return
    emulated, _ = emulate(**t, scheme=chosen.scheme, attn_mask=pairs)
    assert matrix.workloads.relative_l2(out, emulated) <= matrix.EMULATION_BOUND[chosen.scheme.pv] + matrix.OUTPUT_STEP["bfloat16"]
    assert (lse - exact_lse)[~nothing].abs().mean() <= 0.02


@each_variant
def test_keys_in_an_order_of_their_own_are_keys_moved(card: Lanes, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if card.capability.arch < VARIANTS[variant].min_arch:
        pytest.skip(f"{variant} is not for sm_{card.capability.arch}")
    t, _ = matrix.tensors(matrix.Case(card.head_dim, heads_q=2, heads_kv=1, len_q=40, len_kv=333))
    q, k, v = (t[name][:1] for name in "qkv")
    order, mask = torch.randperm(333, generator=torch.Generator().manual_seed(0)).int(), torch.ones(1, 1, 1, 333, dtype=torch.bool)
    mask[..., 200:210] = False
    problem = on_card({"q": q, "k": k, "v": v}, attn_mask=mask)
    chosen = plan(problem, card.capability, variant, arch=card.capability.arch)
    moved = host.quantize(k[:, :, order].contiguous(), v[:, :, order].contiguous(), problem, chosen, mask)
    plain = host.quantize_launches

    def ordered(*given: object) -> tuple:
        *rest, extra = given
        return plain(*rest, extra._replace(order=order.data_ptr()))

    monkeypatch.setattr(host, "quantize_launches", ordered)
    found, expected = (host.attend(q, kv, problem, mask)[0] for kv in (host.quantize(k, v, problem, chosen, mask), moved))
    assert torch.equal(found, expected)
