"""`sageattn_sparse` on CPU tensors: what it hands to the algorithm, what it refuses, and how it is traced."""

from __future__ import annotations

import inspect
import math

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from sageattention import KernelMissing, Unsupported, sageattn_sparse  # noqa: E402
from sageattention.block_order import cube_order, radial_block_mask, vsa_tiles  # noqa: E402
from sageattention.device.capability import Capability  # noqa: E402
from sageattention.numerics.block_selection import Selection  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402
from sageattention.numerics.sparse import Geometry, attend, coarse, exact_share, route  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402
from sageattention.planning.sparse_plan import sparse_plan  # noqa: E402
from sageattention.planning.sparse_problem import SparseProblem  # noqa: E402
from sageattention.planning.verdicts import Verdicts  # noqa: E402
from sageattention.variants import VARIANTS, Candidate  # noqa: E402

TOKENS, BLOCKS = 500, 8


def qkv(len_q=TOKENS, len_kv=None, heads=4, heads_kv=2, head_dim=16, batch=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((heads, len_q), (heads_kv, len_kv or len_q), (heads_kv, len_kv or len_q))
    return tuple((2 * torch.randn(batch, h, n, head_dim, generator=g)).to(dtype) for h, n in shapes)


DEFAULT = Geometry()


def by_the_algorithm(q, k, v, selection, geometry=DEFAULT, tail=True, block_mask=None, sm_scale=None):
    chosen = route(q, k, v, selection, geometry, tail=tail, block_mask=block_mask, sm_scale=sm_scale)
    return (
        *attend(q, k, v, chosen, geometry, sm_scale=sm_scale),
        exact_share(chosen, q.shape[2], k.shape[2], geometry),
    )  # fmt: skip


def check(result, expected):
    for got, wanted in zip(tuple(result), tuple(expected), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-5, atol=1e-5)


LENGTHS = torch.tensor([64, 64, 10, 0, 64, 64, 64, 52], dtype=torch.int32)
KEY_MASK = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.8
ORDER = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(2)).int()
BLOCK_MASK = torch.rand(1, 4, 4, BLOCKS, generator=torch.Generator().manual_seed(3)) < 0.4
# keywords of the call, selection and geometry of the algorithm
CALLS = {
    "default": ({}, Selection("sol", 1.3), Geometry()),
    "sol": ({"tau": 0.7, "q_block": 64}, Selection("sol", 0.7), Geometry(64)),
    "mass": ({"selection": "mass", "tau": 1}, Selection("mass", 1.0), Geometry()),
    "topk": ({"selection": "topk", "keep": 0.4, "neighbours": 0}, Selection("topk", keep=0.4), Geometry(neighbours=0)),
    "no neighbours": ({"selection": "topk", "neighbours": -1}, Selection("topk", keep=0.1), Geometry(neighbours=None)),
    "cdf": ({"selection": "cdf", "keep": 0.5, "similarity": 0.02}, Selection("cdf", keep=0.5, similarity=0.02), Geometry()),
    "tau of heads": (
        {"tau": torch.tensor([0.0, 0.5, 1.0, 2.0])}, [Selection("sol", t) for t in (0.0, 0.5, 1.0, 2.0)], Geometry(),
    ),
    "keep of heads": (
        {"selection": "topk", "keep": torch.tensor([0.0, 0.25, 0.5, 1.0])}, [Selection("topk", keep=s) for s in (0.0, 0.25, 0.5, 1.0)],
        Geometry(),
    ),
    "sinks": ({"sinks": 65, "query_sinks": (490, 500)}, Selection("sol", 1.3), Geometry(sinks=[(0, 65)], query_sinks=[(490, 500)])),
    "sinks in parts": ({"sinks": [(0, 10), (300, 310)]}, Selection("sol", 1.3), Geometry(sinks=[(0, 10), (300, 310)])),
    "order": ({"order": ORDER, "sinks": 3}, Selection("sol", 1.3), Geometry(order=ORDER, sinks=[(0, 3)])),
    "block_len": ({"block_len": LENGTHS}, Selection("sol", 1.3), Geometry(block_len=LENGTHS)),
    "key_mask": ({"key_mask": KEY_MASK}, Selection("sol", 1.3), Geometry(key_mask=KEY_MASK)),
    "causal": ({"is_causal": True}, Selection("sol", 1.3), Geometry(is_causal=True)),
    "scale": ({"sm_scale": -0.1}, Selection("sol", 1.3), Geometry()),
    "no tail": ({"tail": False}, Selection("sol", 1.3), Geometry()),
    "static": ({"selection": "static", "block_mask": BLOCK_MASK}, Selection("static"), Geometry(neighbours=None)),
    "static with neighbours": (
        {"selection": "static", "block_mask": BLOCK_MASK, "neighbours": 1}, Selection("static"), Geometry(neighbours=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ("HND", "NHD"))
@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_the_algorithm(name, layout):
    keywords, selection, geometry = CALLS[name]
    q, k, v = qkv()
    expected = by_the_algorithm(
        q, k, v, selection, geometry, keywords.get("tail", True), keywords.get("block_mask"), keywords.get("sm_scale")
    )  # fmt: skip
    turned = (q, k, v) if layout == "HND" else (t.transpose(1, 2) for t in (q, k, v))
    out, lse, share = sageattn_sparse(*turned, tensor_layout=layout, return_lse=True, return_share=True, **keywords)
    assert out.is_contiguous() and out.dtype == q.dtype and lse.dtype == share.dtype == torch.float32
    check((out if layout == "HND" else out.transpose(1, 2), lse, share), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_runs_on_a_gpu(name):
    there = {key: x.cuda() if isinstance(x, torch.Tensor) else x for key, x in CALLS[name][0].items()}
    result = sageattn_sparse(*(t.cuda() for t in qkv()), return_lse=True, return_share=True, variant="reference", **there)
    check((t.cpu() for t in result), sageattn_sparse(*qkv(), return_lse=True, return_share=True, **CALLS[name][0]))


@pytest.mark.parametrize("q_start", (None, 0, 100))
def test_queries_that_are_a_part_of_the_keys(q_start):
    q, k, v = qkv(130, 400)
    expected = by_the_algorithm(q, k, v, Selection("sol", 1.3), Geometry(q_start=q_start))
    check(sageattn_sparse(q, k, v, q_start=q_start, return_lse=True, return_share=True), expected)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_narrow_dtypes(dtype):
    q, k, v = qkv(dtype=dtype)
    out = sageattn_sparse(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out, by_the_algorithm(q, k, v, Selection("sol", 1.3))[0].to(dtype), rtol=0, atol=0)


def test_what_is_asked_for_is_returned():
    q, k, v = qkv(130)
    out, lse, share = sageattn_sparse(q, k, v, return_lse=True, return_share=True)
    assert torch.equal(sageattn_sparse(q, k, v), out)
    for keywords, extra in (({"return_lse": True}, lse), ({"return_share": True}, share)):
        again, got = sageattn_sparse(q, k, v, **keywords)
        assert torch.equal(again, out) and torch.equal(got, extra)


def test_vsa_of_padded_tiles():
    """A ragged grid behind a prefix, padded into tiles: the coarse part is gated, padding takes no part, and all comes back in order."""
    tiles = vsa_tiles(5, 6, 7, prefix=(30,))
    q, k, v = (torch.nn.functional.normalize(t, dim=-1) * 4 for t in qkv(240, heads=2))
    gate = torch.rand(q.shape, generator=torch.Generator().manual_seed(5))
    padded = [tiles.pad(t, 2) for t in (q, k, v, gate)]
    keywords = {
        "selection": "topk", "keep": 0.3, "q_block": 64, "neighbours": -1, "tail": False, "block_len": tiles.block_len,
        "sinks": tiles.prefix_slots, "query_sinks": tiles.prefix_slots,
    }  # fmt: skip
    out = tiles.unpad(sageattn_sparse(*padded[:3], coarse_gate=padded[3], **keywords), 2)
    sparse = tiles.unpad(sageattn_sparse(*padded[:3], **keywords), 2)
    means = tiles.unpad(coarse(*padded[:3], Geometry(64, block_len=tiles.block_len)), 2)
    torch.testing.assert_close(out, (sparse + gate * means).float(), rtol=1e-5, atol=1e-5)
    for t in padded[1:3]:
        t[:, :, tiles.rows < 0] = math.nan  # what a kernel must not read
    assert torch.equal(tiles.unpad(sageattn_sparse(*padded[:3], **keywords), 2), sparse)
    everything = tiles.unpad(sageattn_sparse(*padded[:3], **{**keywords, "keep": 1.0}), 2)
    torch.testing.assert_close(everything, oracle(q, k, v)[0].float(), rtol=1e-5, atol=1e-5)


def test_helpers_fit_the_call():
    q, k, v = qkv(2 * 130 + 20)
    order = cube_order(2, 10, 13, prefix=20)
    exact = oracle(q, k, v)[0].float()
    torch.testing.assert_close(sageattn_sparse(q, k, v, order=order, selection="topk", keep=1), exact, rtol=1e-5, atol=1e-5)
    mask = radial_block_mask(2, 130, prefix=20)
    assert sageattn_sparse(q, k, v, selection="static", block_mask=mask).isfinite().all()


@pytest.mark.parametrize("lengths", [(0, 10), (10, 0), (0, 0)])
def test_nothing_to_attend(lengths):
    q, k, v = qkv()
    out, lse, share = sageattn_sparse(
        q[:, :, : lengths[0]], k[:, :, : lengths[1]], v[:, :, : lengths[1]], return_lse=True, return_share=True
    )
    assert out.shape[2] == lengths[0] and (out == 0).all() and (lse == -math.inf).all() and share == 1


# --- refusals

HUGE = torch.full((4,), math.inf)
REFUSED = {
    "selection": ({"selection": "best"}, "accepted are 'sol'"),
    "tau": ({"tau": math.nan}, "finite"),
    "tau infinite": ({"tau": -math.inf}, "finite"),
    "tau of another type": ({"tau": "1"}, "finite"),
    "tau negative": ({"selection": "mass", "tau": -1.0}, ">= 0"),
    "tau of heads infinite": ({"tau": HUGE}, "holds values from inf"),
    "tau of heads of another shape": ({"tau": torch.ones(3)}, r"accepted is \[4\]"),
    "tau of heads of another dtype": ({"tau": torch.ones(4).double()}, "float32"),
    "tau unused": ({"selection": "topk", "tau": 1.0}, "takes none"),
    "keep": ({"selection": "topk", "keep": 1.5}, "from 0 to 1"),
    "keep below": ({"selection": "cdf", "keep": -0.1}, "from 0 to 1"),
    "keep a flag": ({"selection": "topk", "keep": True}, "from 0 to 1"),
    "keep of heads": ({"selection": "topk", "keep": torch.tensor([0.1, 0.2, 0.3, 1.1])}, "from 0 to 1"),
    "keep unused": ({"keep": 0.2}, "'topk' and 'cdf' do"),
    "similarity": ({"similarity": 2.0}, "from -1 to 1"),
    "similarity with static": ({"selection": "static", "block_mask": BLOCK_MASK, "similarity": 0.1}, "accepted is 0"),
    "q_block": ({"q_block": 32}, "64 and 128"),
    "tail": ({"tail": "no"}, "True and False"),
    "neighbours": ({"neighbours": -2}, "integer >= 0"),
    "q_start": ({"q_start": -1}, "integer >= 0"),
    "sinks": ({"sinks": 501}, "within the sequence's 500 tokens"),
    "sinks reversed": ({"sinks": (30, 20)}, "within"),
    "sinks below": ({"sinks": [(-1, 20)]}, "within"),
    "sinks of another type": ({"sinks": "all"}, "accepted are a number of tokens"),
    "query_sinks": ({"query_sinks": (490, 501)}, "within the sequence's 500 tokens"),
    "order": ({"order": torch.zeros(500, dtype=torch.int32)}, "permutation"),
    "order too short": ({"order": ORDER[:-1]}, r"accepted is \[500\]"),
    "order of another dtype": ({"order": ORDER.long()}, "int32"),
    "order of a list": ({"order": list(range(500))}, "got list"),
    "order with causal": ({"order": ORDER, "is_causal": True}, "causal"),
    "order with q_start": ({"order": ORDER, "q_start": 64}, "the same tokens"),
    "block_len": ({"block_len": torch.full((8,), 65, dtype=torch.int32)}, "from 0 to 64"),
    "block_len below": ({"block_len": -LENGTHS}, "from 0 to 64"),
    "block_len of another shape": ({"block_len": LENGTHS[:-1]}, r"accepted is \[8\] or \[1, 8\] or \[2, 8\]"),
    "block_mask missing": ({"selection": "static"}, "needs one"),
    "block_mask unused": ({"block_mask": BLOCK_MASK}, "only 'static'"),
    "block_mask of another shape": ({"selection": "static", "block_mask": BLOCK_MASK[..., :-1]}, r"\[1, 1, 4, 8\]"),
    "block_mask of another q_block": ({"selection": "static", "block_mask": BLOCK_MASK, "q_block": 64}, r"\[2, 4, 8, 8\]"),
    "block_mask of another dtype": ({"selection": "static", "block_mask": BLOCK_MASK.int()}, "torch.bool"),
    "block_mask elsewhere": ({"selection": "static", "block_mask": BLOCK_MASK.to("meta")}, "one device"),
    "key_mask": ({"key_mask": KEY_MASK[:, None, None]}, r"accepted is \[2, 500\]"),
    "key_mask additive": ({"key_mask": KEY_MASK.float()}, "torch.bool"),
    "coarse_gate": ({"coarse_gate": torch.ones(2, 4, 500, 1)}, r"accepted is \[2, 4, 500, 16\]"),
    "coarse_gate with causal": ({"coarse_gate": torch.ones(2, 4, 500, 16), "is_causal": True}, "causal"),
    "tensor_layout": ({"tensor_layout": "BHND"}, "HND"),
    "variant": ({"variant": "sdpa"}, "accepted of block-sparse calls"),
    "variant unknown": ({"variant": "fastest"}, "accepted of block-sparse calls"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name):
    keywords, words = REFUSED[name]
    with pytest.raises(Unsupported, match=words) as refused:
        sageattn_sparse(*qkv(), **keywords)
    assert refused.value.parameter == name.split(" ")[0]


def test_a_gradient_is_refused():
    q, k, v = qkv(130)
    q.requires_grad_()
    with pytest.raises(Unsupported, match="gradient"):
        sageattn_sparse(q, k, v)
    with torch.no_grad():
        sageattn_sparse(q, k, v)


def test_values_are_looked_at_again_after_a_write():
    q, k, v = qkv()
    order = ORDER.clone()
    sageattn_sparse(q, k, v, order=order)
    order[0] = order[1]
    with pytest.raises(Unsupported, match="permutation"):
        sageattn_sparse(q, k, v, order=order)


# --- variants


@pytest.mark.parametrize("name", [name for name, v in VARIANTS.items() if v.backend == "cuda"])
def test_cuda_variants_say_what_they_lack(name):
    with pytest.raises(Unsupported, match="needs a tensor on an NVIDIA GPU"):
        sageattn_sparse(*qkv(130), variant=name)


def planned(arch: int, variant: str = "auto", name: str = "a card", verdicts: Verdicts | None = None, **call):
    q, k, v = qkv(130)
    dense = Problem.from_tensors(q, k, v, tensor_layout="HND", is_causal=call.pop("is_causal", False), sm_scale=None, return_lse=True)
    empty = dict.fromkeys(("tau", "keep", "neighbours", "q_start", "order", "block_len", "block_mask", "key_mask", "coarse_gate"))
    rest = {"selection": "sol", "similarity": 0.0, "q_block": 128, "tail": True, "sinks": (), "query_sinks": ()}
    problem, _ = SparseProblem.from_call(dense, q, **{**empty, **rest, **call})
    return sparse_plan(problem, Capability("cuda", arch, 132, name=name), variant, verdicts=verdicts)


@pytest.mark.parametrize(
    "arch, variant",
    [(75, "sageattn_qk_int8_pv_int8_cuda"), (86, "sageattn_qk_int8_pv_int8_cuda"), (89, "sageattn_qk_int8_pv_int8_cuda"),
     (90, "sageattn_qk_int8_pv_fp8_cuda_sm90"), (120, "sageattn_qk_int8_pv_int8_cuda"),
     # newer ones of a family: as in dense calls, its candidates
     (87, "sageattn_qk_int8_pv_int8_cuda"), (121, "sageattn_qk_int8_pv_int8_cuda")],
)  # fmt: skip
def test_auto_takes_the_first_of_its_candidates(arch, variant):
    chosen = planned(arch)
    assert chosen.variant.name == variant and chosen.tile.block_n == 64 and chosen.attend.split("_")[-2] == "list"


def test_what_was_wrong_on_a_card_is_passed_by_and_refused_by_name():
    known = Verdicts(off={Candidate("sageattn_qk_int8_pv_int8_cuda"): "its result is off by a lot"})
    assert planned(89, verdicts=known).variant.name == "sageattn_qk_int8_pv_fp8_cuda"
    with pytest.raises(KernelMissing, match="off by a lot; choose 'auto'"):
        planned(89, "sageattn_qk_int8_pv_int8_cuda", verdicts=known)


def test_where_no_kernel_is_for_the_card():
    with pytest.raises(KernelMissing, match=r"no variant is for compute capability 10\.0") as missing:
        planned(100)
    assert missing.value.variant == "auto"
    assert planned(100, "reference").variant.name == "reference"
    assert planned(100, "sageattn_qk_int8_pv_fp16_cuda").variant.name == "sageattn_qk_int8_pv_fp16_cuda"


def test_a_card_without_tensor_cores_gets_none_of_its_candidates():
    with pytest.raises(KernelMissing, match="no block-sparse kernel runs here"):
        planned(75, name="NVIDIA GeForce GTX 1660")


def test_causal_queries_from_the_middle_are_the_references():
    with pytest.raises(Unsupported, match="variant='reference'"):
        planned(90, "sageattn_qk_int8_pv_fp16_cuda", is_causal=True, q_start=64)
    assert planned(90, "reference", is_causal=True, q_start=64).variant.name == "reference"


def test_reference_is_what_auto_takes_on_a_cpu():
    q, k, v = qkv(130)
    assert torch.equal(sageattn_sparse(q, k, v, variant="reference"), sageattn_sparse(q, k, v))


def test_the_signature_is_explicit():
    parameters = inspect.signature(sageattn_sparse).parameters.values()
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["q", "k", "v"]
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters)


# --- traced


def test_compiles_without_a_break():
    q, k, v = qkv()
    keep = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def call(q, k, v, keep):
        return sageattn_sparse(q + 0, k, v, selection="topk", keep=keep, sinks=[(0, 10), (70, 80)], order=ORDER, return_lse=True)

    for got, expected in zip(torch.compile(call, fullgraph=True, backend="eager")(q, k, v, keep), call(q, k, v, keep)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", ("HND", "NHD"))
def test_fake_tensors_get_the_shapes(layout):
    with FakeTensorMode():
        q = torch.empty(2, 4, 500, 16, dtype=torch.bfloat16).transpose(1, 2)
        k = torch.empty(2, 2, 500, 16, dtype=torch.bfloat16).transpose(1, 2)
        q, k = (t if layout == "NHD" else t.transpose(1, 2) for t in (q, k))
        out, lse, share = sageattn_sparse(q, k, k, tensor_layout=layout, return_lse=True, return_share=True)
    assert out.shape == q.shape and out.dtype == q.dtype and out.is_contiguous()
    assert lse.shape == (2, 4, 500) and lse.dtype == share.dtype == torch.float32 and share.shape == ()
