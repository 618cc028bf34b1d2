"""The sparse node, the example workflows and the help pages in a real ComfyUI's server. Needs COMFYUI_PATH, see test_comfyui.py."""

from __future__ import annotations

import json
import math
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import examples
import pytest
from comfy_server import Server, serving
from pack import ROOT

COMFYUI = os.environ.get("COMFYUI_PATH", "")
pytestmark = pytest.mark.comfyui
HERE = {"variant": "reference", "min_tokens": 256, "start_percent": 0.0}
CALLS = 4  # of self attention: 2 layers, 2 steps; cond and uncond in one batch


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Server:
    with serving(Path(COMFYUI), tmp_path_factory.mktemp("base") / "comfyui") as running:
        yield running


def workflow(*patches: dict[str, Any]) -> dict[str, Any]:
    """TinyVideo, nodes on its model one after the other, a sampler, the report."""
    model, prompt = ["video", 0], {"video": {"class_type": "TinyVideo", "inputs": {}}}
    for i, patch in enumerate(patches):
        kind = "PatchSageAttention" if patch.get("variant") and len(patch) == 1 else "SageSparseAttention"
        prompt[f"patch{i}"] = {"class_type": kind, "inputs": {"model": model, **patch}}
        model = [f"patch{i}", 0]
    prompt["sampler"] = {
        "class_type": "KSampler",
        "inputs": {
            "model": model, "seed": 1, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            "positive": ["video", 1], "negative": ["video", 2], "latent_image": ["video", 3],
        },
    }  # fmt: skip
    prompt["report"] = {"class_type": "Report", "inputs": {"model": model, "samples": ["sampler", 0]}}
    return prompt


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    return math.dist(one["latent"], other["latent"]) / math.hypot(*other["latent"])


@pytest.fixture(scope="module")
def unpatched(server) -> dict[str, Any]:
    return server.run(workflow())


@pytest.mark.parametrize(
    "selection",
    [
        {"selection": "mass", "selection.tau": 2.0},  # as a core with nested inputs posts it
        {"selection": "mass", "selection.tau": 2.0, "selection.keep_percent": 10.0, "selection.decay_factor": 1.0},  # … and without
        {"selection": "sla", "selection.keep_percent": 40.0},
        {"selection": "cdf", "selection.hold_percent": 60.0},
    ],
)
def test_a_prompt_of_either_form_samples_sparsely(selection, server, unpatched):
    found = server.run(workflow(HERE | selection))
    ran = found["counts"]["ran"]
    assert ran["sparse reference"] >= CALLS // 2 and not found["counts"]["fallbacks"]
    assert 1e-6 < distance(found, unpatched) < 0.1


def test_all_blocks_are_dense_attention(server, unpatched):
    found = server.run(workflow(HERE | {"selection": "mass", "selection.tau": 0.0}))
    assert found["counts"]["ran"] and distance(found, unpatched) < 1e-4


@pytest.mark.parametrize("sparse_first", [False, True])
def test_it_shares_the_work_with_the_dense_node_in_either_order(sparse_first, server):
    patches = [HERE | {"selection": "mass", "selection.tau": 2.0 + sparse_first / 100}, {"variant": "reference"}]
    found = server.run(workflow(*(patches if sparse_first else reversed(patches))))
    assert found["counts"]["ran"]["sparse reference"] >= CALLS // 2
    assert sum(found["counts"]["ran"].values()) == 2 * CALLS  # cross attention is the dense node's


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"start_percent": 0.9, "end_percent": 0.5}, "start_percent"),
        ({"selection": "mass", "selection.tau": -1.0}, "tau"),
        ({"dense_blocks": "some"}, "dense_blocks"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(given, said, server):
    with pytest.raises(urllib.error.HTTPError) as refused:
        server.get("/prompt", {"prompt": workflow(HERE | {"selection": "mass", "selection.tau": 2.0} | given)})
    answer = json.load(refused.value)
    errors = answer["node_errors"]["patch0"]["errors"]
    assert all(said in error["details"] for error in errors), answer


def test_examples_are_of_nodes_and_links_that_this_core_knows(server):
    info = server.get("/object_info")
    for name, described in examples.WORKFLOWS.items():
        assert examples.problems(examples.api_form(described), info) == [], name
    committed = {str(p.relative_to(examples.FOLDER)): p.read_text(encoding="utf-8") for p in examples.FOLDER.rglob("*.json")}
    assert committed == examples.files(info)  # `python tests/examples.py COMFYUI_PATH` writes them


def test_the_template_browser_lists_the_examples(server):
    assert sorted(server.get("/workflow_templates")[server.pack.name]) == sorted(examples.WORKFLOWS)


def test_every_node_has_a_help_page_in_both_languages(server):
    nodes = [name for name, about in server.get("/object_info").items() if about["python_module"] == f"custom_nodes.{server.pack.name}"]
    assert len(nodes) >= 2
    for node in nodes:
        for page in (f"{node}.md", f"{node}/zh.md"):
            assert (ROOT / "web" / "docs" / page).is_file(), page
            with urllib.request.urlopen(f"{server.url}/extensions/{server.pack.name}/docs/{page}") as answer:
                assert answer.read().decode().startswith("# ")


def test_locales_are_served(server):
    found = server.get("/i18n")
    assert found["zh"]["nodeDefs"]["SageSparseAttention"]["display_name"] and "SageSparseAttention" in found["en"]["nodeDefs"]
