"""`explain`, `available_variants`, the environment's choice, and the log's line for each variant that runs."""

from __future__ import annotations

import logging

import pytest

torch = pytest.importorskip("torch")

from api_calls import CUDA_FUNCTIONS, QUANTISED, qkv  # noqa: E402

import sageattention  # noqa: E402
from sageattention import Unsupported, dispatch, sageattn, settings  # noqa: E402
from sageattention.variants import VARIANTS  # noqa: E402


def test_explain():
    q, k, v = qkv()
    explanation = sageattention.explain(q, k, v)
    assert (explanation.variant, explanation.device) == ("sdpa", "cpu") and "cpu" in str(explanation)
    assert sageattention.explain(q, k, v, variant=QUANTISED).variant == QUANTISED
    with pytest.raises(Unsupported, match="NVIDIA"):
        sageattention.explain(q, k, v, variant=next(iter(CUDA_FUNCTIONS)))


def test_available_variants_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = {a.name: a for a in sageattention.available_variants("cpu")}
    assert list(found) == list(VARIANTS)
    assert found["sdpa"].status == found["reference"].status == "ready"
    for name in CUDA_FUNCTIONS:
        assert found[name].status == "unsupported" and "NVIDIA" in found[name].reason
    assert found["sageattn_qk_int8_pv_fp16_triton"].status in ("unsupported", "missing")
    assert all(a.summary and (a.reason or a.status == "ready") for a in found.values())


@pytest.mark.usefixtures("hopper_without_kernels")
def test_available_variants_names_what_is_missing():
    found = {a.name: a for a in sageattention.available_variants("cpu")}
    assert found["sageattn_qk_int8_pv_fp16_triton"].status == "missing"
    assert "install" in found["sageattn_qk_int8_pv_fp16_triton"].reason


def test_variant_from_the_environment(monkeypatch, caplog):
    q, k, v = qkv()
    monkeypatch.setenv("SAGEATTENTION_VARIANT", QUANTISED)
    assert sageattention.explain(q, k, v).variant == QUANTISED
    assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant=QUANTISED))
    assert sageattention.explain(q, k, v, variant="sdpa").variant == "sdpa"  # a name in the call wins
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "")
    settings.forget()
    assert sageattention.explain(q, k, v).variant == "sdpa"
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "fastest")
    settings.forget()
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    assert caplog.text.count("SAGEATTENTION_VARIANT is 'fastest'") == caplog.text.count("'sageattn_qk_int8_pv_fp16_triton'") == 1
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "sageattn_qk_int8_pv_fp8_cuda")
    settings.forget()
    for _ in range(2):
        assert torch.equal(sageattn(q, k, v), sageattn(q, k, v, variant="sdpa"))
    assert caplog.text.count("needs a tensor on an NVIDIA GPU") == 1
    with pytest.raises(Unsupported, match="NVIDIA"):  # a name in the call is an order
        sageattn(q, k, v, variant="sageattn_qk_int8_pv_fp8_cuda")


def test_the_first_call_of_each_variant_is_told_whichever_way_it_came(monkeypatch, caplog):
    q, k, v = qkv()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            sageattn(q, k, v)
            sageattn(q, k, v, variant=QUANTISED)
            sageattention.scaled_dot_product_attention(q, k, v)
        torch._dynamo.reset()
        monkeypatch.setattr(dispatch, "_ran", {"sdpa"})
        torch.compile(lambda q: sageattn(q, k, v, variant=QUANTISED), backend="eager")(q)
    told = [r.getMessage() for r in caplog.records if r.name == "sageattention"]
    assert [line.split(":")[1].split()[-1] for line in told] == ["sdpa", QUANTISED, QUANTISED]
    assert "on cpu tensors quantising gains nothing" in told[0]


def test_arch_from_the_environment(monkeypatch):
    monkeypatch.setenv("SAGEATTENTION_ARCH", "turing")
    with pytest.raises(Unsupported, match="SAGEATTENTION_ARCH"):
        sageattn(*qkv())
