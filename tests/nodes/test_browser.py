"""The nodes as a user sees them: ComfyUI's front end in a headless Chromium of 1280 x 800 pixels. Screenshots go to out/browser/.

Needs COMFYUI_PATH (see test_comfyui.py), Chromium and ChromeDriver: `python dev.py browser`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import examples
import pytest
from browser import Browser, browsing
from comfy_server import Server, serving
from pack import ROOT

COMFYUI = Path(os.environ.get("COMFYUI_PATH", ""))
PICTURES = ROOT / "out" / "browser" / COMFYUI.name
OURS = ("PatchSageAttention", "SageSparseAttention", "SageAttentionReport", "SageAttentionBenchmark")
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingNodesWarning": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
}
# Of the core's own front end: services that it looks for elsewhere, files that a new user does not have yet, and routes that an older
# core lacks.
NOT_OURS = re.compile(r"comfy\.org|/api/(userdata|jobs|global_subgraphs)|Jobs API|user\.css|favicon|templates/|fuse options|before init")
pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

# Texts that do not fit into their node: a widget's label and value with the arrows beside them; the title, where the node has been given a
# width (the front end's own is too narrow for titles of more than 20 letters, until a picture is shown).
CUT_OFF = """
    const found = [], context = app.canvas.ctx;
    const width = (text, size) => {
        context.font = `${size}px ${LiteGraph.NODE_FONT}`;
        return context.measureText(String(text)).width;
    };
    context.save();
    for (const node of app.graph._nodes.filter(n => args[0].includes(n.type))) {
        if (args[1] && width(node.getTitle(), LiteGraph.NODE_TEXT_SIZE) > node.size[0] - 50) found.push(`${node.type}: title`);
        for (const widget of node.widgets ?? []) {
            if (typeof widget.value === 'object' || widget.type === 'customtext') continue;
            const wide = width(widget.label ?? widget.name, LiteGraph.NODE_SUBTEXT_SIZE) + width(widget.value, LiteGraph.NODE_SUBTEXT_SIZE);
            if (wide > node.size[0] - 90) found.push(`${node.type}.${widget.name}: ${wide} of ${node.size[0] - 90} pixels`);
            if (widget.last_y !== undefined && widget.last_y + 20 > node.size[1]) found.push(`${node.type}.${widget.name}: below the edge`);
        }
    }
    context.restore();
    return found;
"""
# Puts nodes in the middle of the window, as large as they fit.
SHOW = """
    const nodes = app.graph._nodes.filter(n => args[0].includes(n.type));
    const left = Math.min(...nodes.map(n => n.pos[0])), right = Math.max(...nodes.map(n => n.pos[0] + n.size[0]));
    const top = Math.min(...nodes.map(n => n.pos[1] - 30)), bottom = Math.max(...nodes.map(n => n.pos[1] + n.size[1]));
    const scale = Math.min(1100 / (right - left), 620 / (bottom - top), 1.5);
    app.canvas.ds.scale = scale;
    app.canvas.ds.offset[0] = 680 / scale - (left + right) / 2;
    app.canvas.ds.offset[1] = 440 / scale - (top + bottom) / 2;
    app.canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 600));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serving(COMFYUI, tmp_path_factory.mktemp("base") / "comfyui") as running:
        user = running.pack.parents[1] / "user" / "default"
        user.mkdir(parents=True, exist_ok=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS))
        yield running


@pytest.fixture(scope="module")
def page(server) -> Iterator[Browser]:
    with browsing() as opened:
        opened.open(server.url)
        opened.wait("return Boolean(window.app?.graph && window.app.canvas && LiteGraph.registered_node_types.PatchSageAttention)")
        opened.errors()
        yield opened


@pytest.fixture(autouse=True)
def no_errors_in_the_console(page) -> Iterator[None]:
    yield
    assert [error for error in page.errors() if not NOT_OURS.search(error)] == []


def load(page: Browser, workflow: dict[str, Any]) -> None:
    page.script("await app.loadGraphData(args[0]); await new Promise(done => setTimeout(done, 300));", workflow)


def fetch(page: Browser, path: str) -> Any:
    return page.script("const answer = await fetch(args[0]); return answer.ok ? await answer.text() : answer.status;", path)


@pytest.mark.parametrize("name", examples.WORKFLOWS)
def test_an_example_loads_from_the_template_browser(name, page, server):
    text = fetch(page, f"/api/workflow_templates/{server.pack.name}/{name}.json")
    load(page, json.loads(text))
    nodes = page.script(
        "return app.graph._nodes.map(n => [n.type, Boolean(LiteGraph.registered_node_types[n.type]),"
        " Object.fromEntries((n.widgets ?? []).map(w => [w.name, w.value]))])"
    )
    assert all(known for kind, known, _ in nodes), [kind for kind, known, _ in nodes if not known]
    described = examples.WORKFLOWS[name].nodes.values()
    shown = [(kind, values) for kind, _, values in nodes if kind != examples.NOTE]
    assert [kind for kind, _ in shown] == [node.type for node in described]
    for node, (kind, values) in zip(described, shown):
        expected = {key: value for key, value in node.inputs.items() if not isinstance(value, tuple)}
        assert expected.items() <= values.items(), kind
    links = sum(isinstance(value, tuple) for node in described for value in node.inputs.values())
    assert page.script("return app.graph.links.size ?? Object.keys(app.graph.links).length") == links
    page.script(SHOW, OURS)
    page.screenshot(PICTURES / f"{name}.png")
    assert page.script(CUT_OFF, OURS, True) == []


def test_an_example_is_posted_in_its_api_form(page):
    described = examples.WORKFLOWS["wan_video_sparse"]
    load(page, json.loads((examples.FOLDER / "wan_video_sparse.json").read_text(encoding="utf-8")))
    posted = page.script("return (await app.graphToPrompt()).output")
    for number, node in examples.api_form(described).items():
        assert posted[number]["class_type"] == node["class_type"]
        assert node["inputs"].items() <= posted[number]["inputs"].items()


@pytest.mark.parametrize("node", OURS)
def test_a_node_added_by_hand_shows_all_its_widgets(node, page):
    load(page, {"nodes": [], "links": [], "version": 0.4})
    page.script("const node = LiteGraph.createNode(args[0]); node.pos = [100, 100]; app.graph.add(node);", node)
    page.script(SHOW, [node])
    page.screenshot(PICTURES / f"node_{node}.png")
    assert page.script(CUT_OFF, [node], False) == []


def test_every_method_brings_its_number(page):
    """Where the front end and the core nest inputs; else all numbers are there at once."""
    load(page, {"nodes": [], "links": [], "version": 0.4})
    found = page.script("""
        const node = LiteGraph.createNode('SageSparseAttention');
        app.graph.add(node);
        const selection = node.widgets.find(w => w.name === 'selection');
        const seen = {};
        for (const name of selection.options.values) {
            selection.value = name;
            selection.callback?.(name);
            seen[name] = node.widgets.filter(w => w.name.startsWith('selection.')).map(w => w.name);
        }
        return seen;
    """)
    numbers = {"mass": "tau", "sol-attn": "tau", "sla": "keep_percent", "budget": "keep_percent", "cdf": "hold_percent",
               "radial": "decay_factor", "vsa": "keep_percent"}  # fmt: skip
    assert found.keys() == numbers.keys()
    assert all(f"selection.{numbers[method]}" in names for method, names in found.items())
    assert all(len(names) == 1 for names in found.values()) or all(len(names) == 4 for names in found.values())


def test_a_tiny_model_runs_and_the_report_shows_a_picture(page, server):
    sampler = examples.WORKFLOWS["sdxl"].nodes["sampler"].inputs
    described = examples.Workflow("", {
        "video": examples.Node("TinyVideo", 0, {}),
        "patch": examples.Node("PatchSageAttention", 1, {"model": ("video", 0), "variant": "auto"}),
        "sparse": examples.Node("SageSparseAttention", 1, {
            "model": ("patch", 0), "selection": "mass", "selection.tau": 2.0, "start_percent": 0.0, "min_tokens": 256,
        }),
        "sampler": examples.Node("KSampler", 2, sampler | {
            "model": ("sparse", 0), "positive": ("video", 1), "negative": ("video", 2), "latent_image": ("video", 3), "steps": 2,
        }),
        "report": examples.Node("SageAttentionReport", 3, {"model": ("sparse", 0), "after": ("sampler", 0)}),
    })  # fmt: skip
    load(page, examples.ui_form("tiny", described, server.get("/object_info")))
    page.script("await app.queuePrompt(0, 1);")
    page.wait(
        "const history = await (await fetch('/history')).json();"
        "return Object.values(history).some(run => run.status.status_str === 'success' && Object.keys(run.outputs).length);",
        seconds=120,
    )
    shown = page.wait("""
        const report = app.graph._nodes.find(n => n.type === 'SageAttentionReport');
        const picture = report.imgs?.[0];
        return picture?.naturalWidth ? [picture.naturalWidth, picture.naturalHeight] : null;
    """)
    assert shown[0] == 1024 and shown[1] > 200
    page.script("app.graph._nodes.forEach(n => { if (n.type === 'SageAttentionReport') n.setSize([700, 620]); });")
    page.script(SHOW, ["SageSparseAttention", "SageAttentionReport"])
    page.screenshot(PICTURES / "report.png")


@pytest.mark.parametrize("node", OURS)
def test_help_is_served_where_the_front_end_looks_for_it(node, page, server):
    for name in (f"{node}.md", f"{node}/zh.md"):
        assert str(fetch(page, f"/extensions/{server.pack.name}/docs/{name}")).startswith("# ")


def test_chinese_texts_are_shown(page, server):
    found = json.loads(fetch(page, "/api/i18n"))
    chinese = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert chinese.items() <= found["zh"]["nodeDefs"].items()
    page.script("await fetch('/api/settings/Comfy.Locale', {method: 'POST', body: JSON.stringify('zh')});")
    try:
        page.open(server.url)
        page.wait("return Boolean(window.app?.graph && window.app.canvas && LiteGraph.registered_node_types.SageSparseAttention)")
        load(page, {"nodes": [], "links": [], "version": 0.4})
        title = page.script("""
            const node = LiteGraph.createNode('SageSparseAttention');
            node.pos = [100, 100];
            app.graph.add(node);
            return node.getTitle();
        """)
        assert title == chinese["SageSparseAttention"]["display_name"]
        page.script(SHOW, ["SageSparseAttention"])
        page.screenshot(PICTURES / "node_SageSparseAttention_zh.png")
        assert page.script(CUT_OFF, ["SageSparseAttention"], False) == []
    finally:
        page.script("await fetch('/api/settings/Comfy.Locale', {method: 'POST', body: JSON.stringify('en')});")
