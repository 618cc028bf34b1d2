"""The pack in a real ComfyUI: tiny models sample through the node, a server runs workflows with it, and the start flag works.

Needs COMFYUI_PATH, a ComfyUI checkout whose requirements are installed in the running Python. The checkout stays as it is.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from comfy_models import STEPS, WORKLOADS  # noqa: E402
from comfy_server import Server, serving  # noqa: E402
from pack import ROOT  # noqa: E402
from PIL import Image  # noqa: E402

from sageattention.variants import VARIANTS  # noqa: E402

COMFYUI = os.environ.get("COMFYUI_PATH", "")
pytestmark = pytest.mark.comfyui

# Of a latent after two steps, relative to the latent by PyTorch's attention, by the type of P and V. Measured by emulation, at most:
# .004 with fp16, .005 with int8, .014 with fp8. The rest is for a card's own rounding between the attentions.
BOUNDS = {"fp16": 0.02, "int8": 0.02, "fp8": 0.04}
BOUND = BOUNDS["fp16"]
NOTHING_MEETS = 1e-9
GUARDS = (0.0, 0.05, NOTHING_MEETS)


@pytest.fixture(scope="module")
def sampled() -> dict[tuple[str, str, float], dict[str, Any]]:
    """(model, variant, max_error) → result: every model, every variant that is ready on this machine, every guard, in one process."""
    # Tensors are tiny, so that threads would only wait for each other; and an interpreted kernel would take minutes.
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "tests" / "comfy_models.py"), COMFYUI, "--max-errors", *map(str, GUARDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(r["model"], r["variant"], r["max_error"]): r for r in results}


@pytest.mark.parametrize("model", WORKLOADS)
def test_models_sample_through_the_node(model, sampled):
    results = [r for (name, _, max_error), r in sampled.items() if name == model and max_error != NOTHING_MEETS]
    assert any(r["variant"] == "reference" for r in results)
    for result in results:
        assert result["ran"] == {result["variant"]: WORKLOADS[model].calls}, result
        assert result["fallbacks"] == {} and result["kept"] == {}, result
        bound = BOUNDS[VARIANTS[result["variant"]].scheme.pv]
        assert result["finite"] and 1e-6 < result["relative_l2"] < bound, result


@pytest.mark.parametrize("model", WORKLOADS)
def test_the_guard_leaves_every_layer_to_the_model_where_nothing_is_good_enough(model, sampled):
    results = [r for (name, _, max_error), r in sampled.items() if name == model and max_error == NOTHING_MEETS]
    assert results
    for result in results:
        assert result["unchanged"] and result["ran"] == {} and sum(result["kept"].values()) == WORKLOADS[model].calls, result


def workflow(variant: str | None, **inputs: Any) -> dict[str, Any]:
    """TinyWan, the node (unless `variant` is None) with more inputs, a sampler, the report: as the front end would post it."""
    model = ["wan", 0] if variant is None else ["patch", 0]
    prompt = {
        "wan": {"class_type": "TinyWan", "inputs": {}},
        "patch": {"class_type": "PatchSageAttention", "inputs": {"model": ["wan", 0], "variant": variant, **inputs}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": model, "seed": 1, "steps": STEPS, "cfg": WORKLOADS["wan"].cfg, "sampler_name": "euler", "scheduler": "simple",
                "positive": ["wan", 1], "negative": ["wan", 2], "latent_image": ["wan", 3], "denoise": 1.0,
            },
        },
        "report": {"class_type": "Report", "inputs": {"model": model, "samples": ["sampler", 0]}},
    }  # fmt: skip
    return {name: node for name, node in prompt.items() if variant is not None or name != "patch"}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative L2 distance of two reported latents."""
    return math.dist(one["latent"], other["latent"]) / math.hypot(*other["latent"])


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    with serving(Path(COMFYUI), tmp_path_factory.mktemp("base") / "comfyui") as running:
        yield running


@pytest.fixture(scope="module")
def unpatched(server) -> dict[str, Any]:
    return server.run(workflow(None))


def test_the_server_offers_the_node(server):
    info = server.get("/object_info/PatchSageAttention")["PatchSageAttention"]
    assert info["output"] == ["MODEL"] and info["python_module"] == "custom_nodes.sage-pack"
    kind, extra = info["input"]["optional"]["variant"]
    choices = extra["options"] if kind == "COMBO" else kind
    assert choices[:2] == ["auto", "disabled"] and "reference" not in choices and extra["default"] == "auto"


def test_the_prompt_queue_runs_a_patched_model(server, unpatched):
    result = server.run(workflow("reference"))
    assert result["counts"] == {"ran": {"reference": WORKLOADS["wan"].calls}, "kept": {}, "fallbacks": {}}
    assert 1e-6 < distance(result, unpatched) < BOUND


def test_patching_left_the_cached_model_unpatched(server, unpatched):
    patched = workflow("reference")
    patched["sampler"]["inputs"]["seed"] = 3  # not one that ran: newer cores answer from their cache with nothing
    server.run(patched)
    again = workflow(None)
    again["sampler"]["inputs"]["denoise"] = 0.99999  # as good as 1, and ComfyUI does not answer from its cache
    result = server.run(again)
    assert result["counts"] is None and distance(result, unpatched) == 0


def test_disabled_samples_like_the_unpatched_model(server, unpatched):
    result = server.run(workflow("disabled"))
    assert result["counts"] is None and distance(result, unpatched) == 0


@pytest.mark.parametrize("variant", ["sageattn_of_tomorrow", "sageattn_qk_int8_pv_fp8_cuda"])
def test_a_saved_variant_that_is_unknown_or_not_for_this_machine_runs_and_says_so(variant, server, unpatched):
    result = server.run(workflow(variant))
    assert result["counts"]["ran"] == {} and result["counts"]["fallbacks"] == {}
    assert sum(result["counts"]["kept"].values()) == WORKLOADS["wan"].calls
    assert distance(result, unpatched) < 1e-4  # PyTorch's attention either way
    assert server.log.count(f"variant '{variant}'") == 1 and "'auto' is used instead" in server.log


def test_a_prompt_without_a_variant_runs_the_default(server, unpatched):
    prompt = workflow("auto")
    del prompt["patch"]["inputs"]["variant"]
    result = server.run(prompt)
    assert sum(result["counts"]["kept"].values()) == WORKLOADS["wan"].calls and distance(result, unpatched) < 1e-4


def test_a_workflow_of_version_3_0_0_offers_the_new_inputs_with_its_behaviour(server):
    """Its widgets are one value, "auto"; the others take their defaults, and stand behind it."""
    info = server.get("/object_info/PatchSageAttention")["PatchSageAttention"]
    assert list(info["input"]["required"]) == ["model"]
    widgets = {name: kind[1].get("default") for name, kind in info["input"]["optional"].items()}
    assert list(widgets.items()) == [
        ("variant", "auto"), ("start_percent", 0.0), ("end_percent", 1.0), ("blocks", ""), ("max_error", 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent (0.6) is above end_percent (0.4)"),
        ({"blocks": "0, x"}, "'x' is no block"),
        ({"max_error": -1}, "max_error is -1"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(inputs, said, server):
    errors = server.refusal(workflow("reference", **inputs))
    assert any(said in error["details"] for error in errors["patch"]["errors"])


def test_the_guard_samples_like_the_unpatched_model_where_nothing_is_good_enough(server, unpatched):
    result = server.run(workflow("reference", max_error=1e-9))
    assert result["latent"] == unpatched["latent"] and result["counts"]["ran"] == {}
    result = server.run(workflow("reference", max_error=0.05))
    assert result["counts"]["ran"] == {"reference": WORKLOADS["wan"].calls} and 1e-6 < distance(result, unpatched) < BOUND


def test_a_window_of_steps(server, unpatched):
    result = server.run(workflow("reference", start_percent=0.3))
    half = WORKLOADS["wan"].calls // STEPS
    assert result["counts"]["ran"] == {"reference": half} and list(result["counts"]["kept"].values()) == [half]
    assert 1e-6 < distance(result, unpatched) < BOUND


def test_the_report_shows_what_ran(server):
    prompt = workflow("reference", max_error=0.05)
    prompt["sampler"]["inputs"]["seed"] = 5
    prompt["shown"] = {"class_type": "SageAttentionReport", "inputs": {"model": ["patch", 0], "after": ["sampler", 0]}}
    prompt["text"] = {"class_type": "PreviewAny", "inputs": {"source": ["shown", 1]}}
    prompt["json"] = {"class_type": "PreviewAny", "inputs": {"source": ["shown", 2]}}
    prompt["passed"] = {"class_type": "Report", "inputs": {"model": ["patch", 0], "samples": ["shown", 3]}}
    shown = server.outputs(prompt)
    found = json.loads(shown["json"]["text"][0])
    assert found["ran"] == {"reference": WORKLOADS["wan"].calls} and found["steps"] == STEPS and found["findings"] == []
    assert found["model"] == "WanModel" and found["attention_ms"] > 0 and found["step_ms"] > found["attention_ms"]
    assert all(0 < row["error"] < 0.05 and row["share"] > 0 for row in found["layers"])
    assert f"{STEPS} steps, {WORKLOADS['wan'].calls} attention calls: reference" in shown["text"]["text"][0]
    (image,) = shown["shown"]["images"]
    picture = Image.open(io.BytesIO(server.bytes(f"/view?filename={image['filename']}&type={image['type']}")))
    assert picture.width == 1024 and picture.height > 600
    assert len(json.loads(shown["passed"]["text"][0])["latent"]) == 1024

    prompt["shown"]["inputs"]["model"] = ["wan", 0]
    found = json.loads(server.outputs(prompt)["json"]["text"][0])
    assert found["calls"] == 0 and found["findings"] == ["No node of ours has patched this model."]
    saved = json.loads((server.base / "user" / "__sageattention" / "report.json").read_text(encoding="utf-8"))
    assert saved == found


def test_the_node_shows_a_line_while_it_samples(server):
    prompt = workflow("reference")
    prompt["sampler"]["inputs"]["seed"] = 7
    heard = server.lines(prompt)
    calls = WORKLOADS["wan"].calls // STEPS
    assert heard and set(heard) <= {("patch", f"step {step}, attention calls: reference {calls}") for step in (1, 2)}
    assert heard[-1][1].startswith(f"step {STEPS}")


def test_the_benchmark_finds_the_model_s_shapes_by_itself(server):
    prompt = {
        "wan": {"class_type": "TinyWan", "inputs": {}},
        "bench": {
            "class_type": "SageAttentionBenchmark",
            "inputs": {"model": ["wan", 0], "latent": ["wan", 3], "positive": ["wan", 1]},
        },
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["bench", 1]}},
        "json": {"class_type": "PreviewAny", "inputs": {"source": ["bench", 2]}},
    }
    shown = server.outputs(prompt)
    found = json.loads(shown["json"]["text"][0])
    assert {row["case"]: row["calls"] for row in found["rows"]} == {"1x2x16x16x128": 2, "1x2x16x8x128": 2}
    assert found["step_ms"]["pytorch"] > 0 and found["step_ms"]["reference"] > 0
    assert "A step: " in shown["text"]["text"][0] and len(shown["bench"]["images"]) == 1


def test_the_variants_are_among_the_server_s_attention_functions(unpatched):
    assert "sage_auto" in unpatched["functions"]


def test_the_pack_loaded_without_a_complaint(server, unpatched):
    assert f"Cannot import {server.pack}" not in server.log and "Error while calling comfy_entrypoint" not in server.log
    assert "PRESTARTUP FAILED" not in server.log


def test_the_start_flag_runs_through_the_bundled_package(tmp_path, unpatched):
    with serving(Path(COMFYUI), tmp_path / "comfyui", "--use-sage-attention", SAGEATTENTION_VARIANT="reference") as server:
        result = server.run(workflow(None))
        assert result["own"] == "attention_sage" and "Using sage attention" in server.log
        assert Path(result["sageattention"]) == server.pack / "sageattention" / "__init__.py"
        assert 1e-6 < distance(result, unpatched) < BOUND
        assert "Error running sage attention" not in server.log
        assert server.log.count("sageattention: attention runs on reference: ") == 1


@pytest.mark.comfy_clients
def test_other_packs_run_on_ours(tmp_path):
    """KJNodes' patch and WanVideoWrapper's attention import `sageattention` themselves."""
    environment = os.environ | {"SAGEATTENTION_VARIANT": "reference", "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / "tests" / "comfy_clients.py"), COMFYUI, os.environ["COMFY_CLIENTS"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kjnodes"].pop("disabled") < 1e-4 and found["kjnodes"]
    for name, far in {**found["kjnodes"], "WanVideoWrapper": found["wanvideowrapper"]}.items():
        assert 1e-6 < far < BOUND, (name, far)
