"""`PatchSageAttention`: what it offers, and whose override is in the model's slot before and after."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Model, OldCore, sdpa  # noqa: E402
from pack import ROOT, load_pack  # noqa: E402

PACK = load_pack()
patch, slot, adapter = PACK.nodes.patch, PACK.nodes.slot, PACK.nodes.adapter
NODE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]


def other(func, *args, **kwargs):
    """Somebody else's override."""
    return func(*args, **kwargs)


def patched(model: Model, variant: str) -> Model:
    return NODE().execute(model, variant)[0]


def test_the_combo_offers_every_variant_with_kernels():
    inputs = NODE.INPUT_TYPES()
    choices, extra = inputs["optional"]["variant"]
    assert choices[:2] == ["auto", "disabled"] and extra["default"] == "auto"
    assert set(choices[2:]) == set(PACK.sageattention.variants.VARIANTS) - {"sdpa", "reference"}
    assert set(inputs["required"]) == {"model"}


@pytest.mark.parametrize("lacking", [(), ("fp8_cuda_sm90",), ("fp16_cuda", "fp8_cuda", "fp8_cuda_sm90", "int8_cuda", "fp16_triton")])
def test_the_tooltip_is_short_and_tells_what_this_machine_lacks(lacking, monkeypatch):
    Availability = PACK.sageattention.Availability

    def found(device):
        ready = {name: name.removeprefix(patch.PREFIX) not in lacking for name in PACK.sageattention.variants.VARIANTS}
        return [Availability(name, "a summary", "ready" if here else "unsupported", "a reason") for name, here in ready.items()]

    monkeypatch.setattr(patch, "available_variants", found)
    lines = NODE.INPUT_TYPES()["optional"]["variant"][1]["tooltip"].splitlines()
    assert len(lines) <= 6 and max(map(len, lines)) <= 100
    short = {name.removeprefix(patch.PREFIX) for name in patch.CHOICES}
    assert all(any(name in line for line in lines[:5]) for name in short)
    told = lines[-1].partition("Not on this machine: ")[2].rstrip(".").split(", ") if lacking else []
    assert set(told) == set(lacking) and (lacking or lines[-1] == "This machine has them all.")


@pytest.mark.parametrize("node", PACK.NODE_CLASS_MAPPINGS.values(), ids=list(PACK.NODE_CLASS_MAPPINGS))
def test_every_tooltip_fits_below_the_top_bar(node):
    """The front end cuts off a taller one; a beginner reads no more, either."""
    inputs = node.INPUT_TYPES()
    for name, (_, *extra) in {**inputs["required"], **inputs["optional"]}.items():
        lines = extra[0]["tooltip"].splitlines()
        assert 1 <= len(lines) <= 6 and max(map(len, lines)) <= 100, name


def test_a_prompt_without_a_variant_gets_the_default_and_a_saved_reference_still_runs(caplog):
    assert slot.owner(NODE().execute(Model())[0]).variant == "auto" and NODE.VALIDATE_INPUTS() is True
    with caplog.at_level(logging.INFO):
        assert slot.owner(patched(Model(), "reference")).variant == "reference"
    assert not caplog.records


def test_patching_leaves_the_original_and_earlier_clones_alone():
    model = Model()
    first = patched(model, "reference")
    second = patched(model, "auto")
    assert KEY not in model.options
    assert (slot.owner(first).variant, slot.owner(second).variant) == ("reference", "auto")


def test_patching_again_replaces_our_override_instead_of_stacking():
    twice = patched(patched(Model(other), "reference"), "auto")
    assert slot.owner(twice).variant == "auto" and slot.owner(twice).previous is other


def test_disabled_takes_out_ours_and_nobody_else_s():
    assert KEY not in patched(patched(Model(), "reference"), "disabled").options
    assert slot.owner(patched(patched(Model(other), "reference"), "disabled")) is other
    assert slot.owner(patched(Model(other), "disabled")) is other
    assert KEY not in patched(Model(), "disabled").options

    ours_below = patched(Model(), "reference")
    ours_below.options[KEY] = other  # a node after ours took the slot over
    assert slot.owner(patched(ours_below, "disabled")) is other


def test_disabled_leaves_the_model_it_was_given_patched():
    model = patched(Model(), "reference")
    patched(model, "disabled")
    assert slot.owner(model).variant == "reference"


@pytest.mark.parametrize(
    ("variant", "said"),
    [("sageattn_of_tomorrow", "not known"), ("", "not known"), ("sageattn_qk_int8_pv_fp8_cuda", "NVIDIA GPU")],
)
def test_a_saved_workflow_s_unusable_variant_loads_runs_and_says_so(variant, said, caplog):
    assert NODE.VALIDATE_INPUTS(variant) is True
    with caplog.at_level(logging.INFO):
        model = patched(Model(), variant)
    assert repr(variant) in caplog.text and said in caplog.text and "'auto' is used instead" in caplog.text
    q = torch.randn(1, 8, 32)
    out = OldCore().attention(q, q, q, 2, transformer_options=model.options)
    assert torch.equal(out, sdpa(q, q, q, 2))
    assert not slot.owner(model).record.fallbacks


def test_usable_variants_are_taken_silently(caplog):
    with caplog.at_level(logging.INFO):
        assert [patch.usable(v, torch.device("cpu")) for v in ("auto", "reference")] == ["auto", "reference"]
    assert not caplog.records


LOAD = """
import sys
sys.path.insert(0, sys.argv[1])
from pack import load_pack
pack = load_pack()
assert not any(m == "sageattention" or m.startswith("sageattention.") for m in sys.modules), "took the public name"
assert set(pack.NODE_CLASS_MAPPINGS) >= {"PatchSageAttention", "SageSparseAttention"} and not hasattr(pack, "comfy_entrypoint")
sys.path.insert(0, sys.argv[2])
import sageattention
assert sageattention.foreign and pack.sageattention is not sageattention
"""


def test_loads_under_a_private_name_beside_a_foreign_sageattention(tmp_path):
    (tmp_path / "sageattention.py").write_text("foreign = True\n")
    done = subprocess.run([sys.executable, "-c", LOAD, str(ROOT / "tests"), str(tmp_path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
