"""What a program sets for all of torch – a default dtype, a default device, autocast – changes no result and lets no call fail."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import sageattention  # noqa: E402
from sageattention import Unsupported, sageattn, sageattn_sparse, sageattn_varlen, scaled_dot_product_attention, verify  # noqa: E402
from sageattention.numerics import hadamard  # noqa: E402
from sageattention.numerics.rows import spread  # noqa: E402

ROOT = Path(sageattention.__file__).resolve().parent.parent
FLOATING = {"zeros", "ones", "full", "empty", "linspace", "logspace", "eye", "rand", "randn"}  # what torch makes in its default dtype
FACTORIES = FLOATING | {"arange", "tensor", "randint", "randperm"}


@pytest.fixture(params=["bfloat16", "float16", "float64"])
def default_dtype(request):
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def qkv(tokens: int = 64):
    return [torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float32, device="cpu") for i in range(3)]


def calls(q, k, v):
    """A call of each kind that is computed by torch's operators."""
    packed = [t[0].transpose(0, 1).contiguous() for t in (q, k, v)]
    offsets = torch.tensor([0, 20, 64], device="cpu")
    gate = torch.ones_like(q)
    return {
        "reference": sageattn(q, k, v, variant="reference", return_lse=True),
        "sdpa": sageattn(q, k, v, variant="sdpa", return_lse=True),
        "mask": sageattn(q, k, v, attn_mask=q[..., :1] > 0, is_causal=True, return_lse=True),
        "packed": sageattn_varlen(*packed, offsets, offsets, 44, 44, return_lse=True),
        "sparse": sageattn_sparse(q, k, v, selection="mass", coarse_gate=gate, variant="reference", return_lse=True, return_share=True),
        "sparse, all blocks": sageattn_sparse(q, k, v, selection="topk", keep=1.0, variant="reference", return_share=True),
        "sparse, empty": sageattn_sparse(q[:, :, :0], k, v, selection="topk", keep=0.5, variant="reference", return_share=True),
    }


def assert_as_before(found, before):
    for name, expected in before.items():
        for a, b in zip(found[name], expected, strict=True):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b), name


@pytest.fixture
def before():
    """The results where nothing is set. The rotation, which is made once, is made anew under what is."""
    before = calls(*qkv())
    hadamard.matrix.cache_clear()
    yield before
    hadamard.matrix.cache_clear()


def test_results_under_a_default_dtype(before, default_dtype):
    assert_as_before(calls(*qkv()), before)


def test_results_under_a_default_device(before, default_device):
    assert_as_before(calls(*qkv()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_under_autocast(before, dtype):
    with torch.autocast("cpu", dtype):
        assert_as_before(calls(*qkv()), before)


def test_rows_are_rows_whatever_the_default_dtype(default_dtype):
    """In bfloat16 the last of 4,096 rows is number 4,096, and an index beyond the end takes a CUDA context down."""
    for length, most in itertools.product((1, 2, 63, 64, 65, 4_096, 75_601), (1, 2, 64, 128)):
        rows = spread(length, most, torch.device("cpu")).tolist()
        assert len(rows) == min(length, most) and rows[0] == 0 and rows == sorted(set(rows))
        assert rows[-1] == length - 1 or len(rows) == 1
        steps = {after - before for before, after in itertools.pairwise(rows)}
        assert not steps or max(steps) - min(steps) <= 1


def test_what_verifies_a_card_reads_rows_that_are_there(default_dtype):
    q = torch.zeros(1, 1, 4_096, 1)
    assert verify._sampled_rows(q).tolist() == spread(4_096, verify.SAMPLE, q.device).tolist()


def factories(path: Path):
    """(line, name, keywords) of the calls that make a tensor from nothing."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called.startswith("torch.") and called[6:] in FACTORIES:
            yield node.lineno, called[6:], {keyword.arg for keyword in node.keywords}


def test_tensors_from_nothing_name_their_device_and_their_dtype():
    """Not one depends on a default: on a machine with a card nobody would see it before some program sets one."""
    paths = [*(ROOT / "sageattention").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    found = [(path, *made) for path in paths for made in factories(path)]
    assert len(found) > 50  # it looks at something
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: torch.{name}"
        for path, line, name, keywords in found
        if "device" not in keywords or (name in FLOATING and "dtype" not in keywords)
    ]
    assert not wrong


# --- what torch's function does under autocast, and where sizes broadcast


def compiled(function):
    """Twice what it gives, compiled anew."""
    torch._dynamo.reset()
    return torch.compile(lambda q, k, v: function(q, k, v) * 2, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [(0,), (2,), (1, 2)])
@pytest.mark.parametrize("function", [scaled_dot_product_attention, sageattn])
def test_dtypes_that_autocast_makes_one_are_torchs(function, which, narrow):
    """A norm gives fp32 and a linear layer a narrow type: torch's function takes both together."""
    given = [t.to(narrow) if i in which else t for i, t in enumerate(qkv())]
    with pytest.raises(Unsupported, match="dtype"):
        function(*given)
    with torch.autocast("cpu", narrow):
        expected = torch.nn.functional.scaled_dot_product_attention(*given)
        assert torch.equal(function(*given), expected) and expected.dtype == narrow
        assert sageattention.explain(*given).variant == "sdpa"
        assert torch.equal(compiled(function)(*given), expected * 2)


BROADCAST = {
    "one batch of K and V": ((3, 4), (1, 4), (1, 4)),
    "one batch of q": ((1, 4), (3, 4), (3, 4)),
    "one batch of V": ((3, 4), (3, 4), (1, 4)),
    "more heads of V": ((1, 4), (1, 2), (1, 4)),
    "more heads of K": ((1, 4), (1, 4), (1, 2)),
}


@pytest.mark.parametrize("sizes", BROADCAST.values(), ids=BROADCAST)
def test_sizes_that_torch_broadcasts_are_torchs(sizes):
    given = [torch.randn(*size, 16, 32) for size in sizes]
    expected = torch.nn.functional.scaled_dot_product_attention(*given, enable_gqa=True)
    for function in (scaled_dot_product_attention, sageattn):
        assert torch.equal(function(*given), expected)
        assert torch.equal(compiled(function)(*given), expected * 2)
    with pytest.raises(Unsupported, match="must be equal"):
        sageattn(*given, variant="reference")
