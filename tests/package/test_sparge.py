"""SpargeAttn's calls: their signatures, what they ask of `sageattn_sparse`, and `import spas_sage_attn`."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported, sageattn_sparse, sparge  # noqa: E402
from sageattention.numerics.reference import oracle  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


def qkv(len_q=500, len_kv=None, heads=2, head_dim=16, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    return tuple((2 * torch.randn(1, heads, n, head_dim, generator=g)).to(dtype) for n in (len_q, len_kv or len_q, len_kv or len_q))


SIGNATURES = {
    "spas_sage2_attn_meansim_cuda": (
        "(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, smooth_k=True, simthreshd1=0.6, cdfthreshd=0.98, "
        "pvthreshd=50, attention_sink=False, tensor_layout='HND', output_dtype=torch.float16, return_sparsity=False)"
    ),
    "spas_sage2_attn_meansim_topk_cuda": (
        "(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, smooth_k=True, simthreshd1=-0.1, cdfthreshd=None, topk=0.5, "
        "pvthreshd=50, attention_sink=False, tensor_layout='HND', output_dtype=torch.float16, return_sparsity=False)"
    ),
    "block_sparse_sage2_attn_cuda": (
        "(q, k, v, mask_id=None, dropout_p=0.0, scale=None, smooth_k=True, pvthreshd=50, attention_sink=False, tensor_layout='HND', "
        "output_dtype=torch.float16, return_sparsity=False)"
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_spargeattn_s(name):
    given = inspect.signature(getattr(sparge, name))
    bare = [p.replace(annotation=p.empty) for p in given.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


@pytest.mark.parametrize("layout", ("HND", "NHD"))
@pytest.mark.parametrize("causal", (False, True))
def test_thresholds_reach_the_selection(causal, layout):
    q, k, v = (t if layout == "HND" else t.transpose(1, 2) for t in qkv())
    same = {"tensor_layout": layout, "is_causal": causal, "neighbours": -1, "tail": False, "sm_scale": 0.2, "return_share": True}
    out, sparsity = sparge.spas_sage2_attn_meansim_topk_cuda(
        q, k, v, is_causal=causal, scale=0.2, topk=0.3, attention_sink=True, tensor_layout=layout, return_sparsity=True
    )
    expected, share = sageattn_sparse(q, k, v, selection="topk", keep=0.3, sinks=64, similarity=-0.1, **same)
    assert torch.equal(out, expected) and sparsity == pytest.approx(1 - float(share)) and 0 < sparsity < 1
    out, sparsity = sparge.spas_sage2_attn_meansim_cuda(
        q, k, v, is_causal=causal, scale=0.2, simthreshd1=0.03, cdfthreshd=0.4, tensor_layout=layout, return_sparsity=True
    )
    expected, share = sageattn_sparse(q, k, v, selection="cdf", keep=0.4, similarity=0.03, **same)
    assert torch.equal(out, expected) and sparsity == pytest.approx(1 - float(share))


def test_thresholds_of_heads():
    q, k, v = qkv()
    keep = torch.tensor([0.2, 0.9], dtype=torch.float64)
    out = sparge.spas_sage2_attn_meansim_topk_cuda(q, k, v, topk=keep)
    for h in (0, 1):
        alone = sparge.spas_sage2_attn_meansim_topk_cuda(*(t[:, h : h + 1] for t in (q, k, v)), topk=float(keep[h]))
        assert torch.equal(out[:, h : h + 1], alone)


def test_uneven_blocks_are_exact_by_default():
    """Random tokens resemble nothing: at SpargeAttn's own threshold of .6 all is computed."""
    q, k, v = qkv(dtype=torch.float32)
    out, sparsity = sparge.spas_sage2_attn_meansim_cuda(q, k, v, return_sparsity=True)
    assert sparsity == 0
    torch.testing.assert_close(out, oracle(q, k, v)[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, asked, given", [
    (torch.bfloat16, torch.float16, torch.bfloat16), (torch.float32, torch.float16, torch.float32),
    (torch.float16, torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32, torch.float32), (torch.bfloat16, None, torch.bfloat16),
])  # fmt: skip
def test_output_dtype(dtype, asked, given):
    assert sparge.spas_sage2_attn_meansim_topk_cuda(*qkv(130, dtype=dtype), output_dtype=asked).dtype == given


# --- masks

LENGTHS = ((512, 512), (500, 500), (300, 700), (130, 64), (60, 100))


@pytest.mark.parametrize("dtype", (torch.bool, torch.int8, torch.float32))
@pytest.mark.parametrize("geometry", ((128, 64), (64, 128)))
@pytest.mark.parametrize("lengths", LENGTHS)
def test_masks_of_both_geometries(lengths, geometry, dtype):
    q, k, v = qkv(*lengths, dtype=torch.float32)
    rows, columns = (-(-n // size) for n, size in zip(lengths, geometry))
    mask = torch.rand(1, 2, rows, columns, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[..., 0] = True
    keep = mask.repeat_interleave(geometry[0], 2)[:, :, : lengths[0]].repeat_interleave(geometry[1], 3)[..., : lengths[1]]
    out, sparsity = sparge.block_sparse_sage2_attn_cuda(q, k, v, mask.to(dtype), return_sparsity=True)
    torch.testing.assert_close(out, oracle(q, k, v, attn_mask=keep)[0].float(), rtol=1e-5, atol=1e-5)
    assert 0 <= sparsity < 1


@pytest.mark.parametrize("block", (64, 128))
def test_radial_attn_s_mask_of_whole_blocks(block):
    """Its node makes masks of ⌊N / block⌋ blocks of 128 (or 64) tokens each way; the ragged end is computed."""
    tokens = 4 * 128 + 57
    q, k, v = qkv(tokens, dtype=torch.float32)
    square = torch.rand(tokens // block, tokens // block, generator=torch.Generator().manual_seed(1)) < 0.5
    square.fill_diagonal_(True)
    mask = square.repeat_interleave(2, 1) if block == 128 else square.unflatten(0, (-1, 2)).any(1)
    out = sparge.block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask.to(torch.int8).expand(1, 2, -1, -1), tensor_layout="HND")
    keep = torch.ones(tokens, tokens, dtype=torch.bool)
    whole = mask.repeat_interleave(128, 0).repeat_interleave(64, 1)
    keep[: whole.shape[0], : whole.shape[1]] = whole
    torch.testing.assert_close(out, oracle(q, k, v, attn_mask=keep)[0].float(), rtol=1e-5, atol=1e-5)


def test_no_mask_is_dense():
    q, k, v = qkv(dtype=torch.float32)
    torch.testing.assert_close(sparge.block_sparse_sage2_attn_cuda(q, k, v), oracle(q, k, v)[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function, keywords, parameter", [
    ("block_sparse_sage2_attn_cuda", {"mask_id": torch.ones(1, 2, 4, 9)}, "mask_id"),
    ("block_sparse_sage2_attn_cuda", {"mask_id": torch.ones(4, 8)}, "mask_id"),
    ("block_sparse_sage2_attn_cuda", {"mask_id": [[1]]}, "mask_id"),
    ("block_sparse_sage2_attn_cuda", {"dropout_p": 0.1}, "dropout_p"),
    ("spas_sage2_attn_meansim_cuda", {"attn_mask": torch.ones(500, 500)}, "attn_mask"),
    ("spas_sage2_attn_meansim_topk_cuda", {"cdfthreshd": 0.9}, "cdfthreshd"),
    ("spas_sage2_attn_meansim_topk_cuda", {"topk": 1.5}, "keep"),
])  # fmt: skip
def test_what_is_not_served_is_refused(function, keywords, parameter):
    with pytest.raises(Unsupported) as refused:
        getattr(sparge, function)(*qkv(), **keywords)
    assert refused.value.parameter == parameter


# --- import spas_sage_attn


def python(code: str, *paths: Path, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {[str(p) for p in paths]!r}\n{code}"],
        capture_output=True, text=True, timeout=120, env={"PATH": "", "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def installed(folder: Path) -> Path:
    (folder / "spas_sage_attn").mkdir()
    (folder / "spas_sage_attn" / "__init__.py").write_text("block_sparse_sage2_attn_cuda = 'the installed one'\n")
    return folder


USE = """
from spas_sage_attn import block_sparse_sage2_attn_cuda
print(getattr(block_sparse_sage2_attn_cuda, '__module__', block_sparse_sage2_attn_cuda))
"""
PRESTARTUP = f"""
import importlib.util
spec = importlib.util.spec_from_file_location('prestartup_script', {str(ROOT / "prestartup_script.py")!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""
ATTEMPT = "try:\n    import spas_sage_attn.{0}\nexcept ImportError as error:\n    print(error)\n"


def test_provide_serves_what_is_not_installed():
    core = "from spas_sage_attn.core import get_cuda_arch_versions, spas_sage2_attn_meansim_cuda\n"
    provide = "from sageattention import sparge\nsparge.provide()\nsparge.provide()\n"
    assert python(provide + core + USE, ROOT) == "sageattention.sparge"
    assert "autotune" in python(provide + ATTEMPT.format("autotune"), ROOT)


def test_provide_shadows_nothing(tmp_path):
    provide = "from sageattention import sparge\nsparge.provide()\n"
    assert python(provide + USE, ROOT, installed(tmp_path)) == "the installed one"


def test_nothing_is_provided_unasked(tmp_path):
    assert "No module named 'spas_sage_attn'" in python("import sageattention.sparge\n" + ATTEMPT.format("core"), ROOT)
    assert "No module named 'spas_sage_attn'" in python(PRESTARTUP + ATTEMPT.format("core"))


def test_comfyui_provides_it_by_the_environment(tmp_path):
    assert python(PRESTARTUP + USE, SAGEATTENTION_SPARGE="1") == "sageattention.sparge"
    assert python(PRESTARTUP + USE, installed(tmp_path), SAGEATTENTION_SPARGE="1") == "the installed one"
