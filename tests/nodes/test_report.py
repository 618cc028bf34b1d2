"""The report: what ran, in numbers, words and a picture; and why a patch had no effect."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from comfy_standin import KEY, Model, OldCore, sample  # noqa: E402
from pack import ROOT, load_pack  # noqa: E402

PACK = load_pack()
slot, record = PACK.nodes.slot, PACK.nodes.record
nodes = PACK.NODE_CLASS_MAPPINGS
report, findings, report_node = PACK.nodes.report, PACK.nodes.findings, PACK.nodes.report_node
REFERENCE = "reference"
OWN = PACK.sageattention.cli.report.OWN
QKV = [torch.randn(1, 200, 128, generator=torch.Generator().manual_seed(i)) for i in range(3)]
TEXT = [torch.randn(1, 20, 128, generator=torch.Generator().manual_seed(i)) for i in range(2)]
STEPS = (1.0, 0.75, 0.5, 0.25)


class Network(torch.nn.Module):
    """Blocks of self and cross attention; the logits of one are peaked."""

    def __init__(self, core, blocks=3, peaked=None):
        super().__init__()
        self.core, self.blocks, self.peaked = core, blocks, peaked

    def forward(self, options):
        out = 0
        for i in range(self.blocks):
            q, k, v = (t * (10 if i == self.peaked and t is not QKV[2] else 1) for t in QKV)
            options = {**options, "block_index": i}
            out = out + self.core.attention(q, k, v, 2, transformer_options=options)
            out = out + self.core.attention(QKV[0], *TEXT, 2, transformer_options=options, low_precision_attention=False)
        return out


def patched(variant=REFERENCE, network=None, **inputs) -> Model:
    model = Model()
    model.model = SimpleNamespace(diffusion_model=network or Network(OldCore()))
    return with_model(nodes["PatchSageAttention"]().execute(model, variant, **inputs)[0], model)


def with_model(clone: Model, model: Model) -> Model:
    clone.model = model.model
    return clone


def sampled(**inputs) -> Model:
    model = patched(**inputs)
    sample(model, model.model.diffusion_model, STEPS)
    return model


def test_every_call_is_accounted_for():
    data = report.of_model(sampled(start_percent=0.25))
    assert (data["model"], data["device"], data["steps"], data["calls"]) == ("Network", "cpu", 4, 24)
    assert data["ran"] == {OWN: 15, REFERENCE: 9} and data["findings"] == []
    assert data["left"] == {"the step is outside of 0.25 to 1": 6, "the model asks for full precision in some layers": 9}
    assert data["nodes"] == [
        {"node": "PatchSageAttention", "variant": REFERENCE, "start_percent": 0.25, "end_percent": 1.0, "blocks": "", "max_error": 0.0}
    ]
    layers = {(row["layer"], tuple(row["shape"])): row for row in data["layers"]}
    assert list(layers) == [(f"block {i}", (1, 2, 200, n, 64)) for i in range(3) for n in (200, 20)]
    assert layers["block 1", (1, 2, 200, 200, 64)]["ran"] == {REFERENCE: 3, OWN: 1}
    assert sum(row["calls"] for row in data["layers"]) == sum(step["calls"] for step in data["by_step"]) == 24
    assert [step["ran"] for step in data["by_step"]] == [{OWN: 6}] + [{REFERENCE: 3, OWN: 3}] * 3
    assert [step["sigma"] for step in data["by_step"]] == list(STEPS)
    assert data["map"] == {"layers": [f"block {i}" for i in range(3)], "steps": [0, 1, 2, 3], "blocks": [[None, 1.0, 1.0, 1.0]] * 3}
    assert layers["block 0", (1, 2, 200, 20, 64)]["kernels"] == ["own"]


def test_times_add_up(monkeypatch):
    monkeypatch.setattr(PACK.nodes.record, "TIMED_OF_ALIKE", 1)  # each: nothing is put at what another call took
    data = report.of_model(sampled())
    assert 0 < data["attention_ms"] < data["step_ms"]
    assert sum(row["share"] for row in data["layers"]) == pytest.approx(1)
    assert sum(row["ms_a_step"] for row in data["layers"]) == pytest.approx(data["attention_ms"])
    assert all(0 < step["attention_ms"] < step["step_ms"] for step in data["by_step"][:2])
    assert all(step["attention_ms"] is None and step["step_ms"] > 0 for step in data["by_step"][2:])


def test_calls_that_were_not_timed_took_as_long_as_those_that_they_are_like():
    model = patched("auto")
    sample(model, Network(OldCore()), STEPS)
    entries, times = slot.record_of(model).entries, report.Times(slot.record_of(model))
    again = [e for e in entries if type(e) is PACK.nodes.record.Again and e.step.timed]
    assert again and all(len(times.of([e])) == (e.step.number == 1) for e in again)
    of_kind = {e.kind: [] for e in entries}
    for e in entries:
        if e.begin and e.step.number == 1:
            of_kind[e.kind].append(e.end.ms_since(e.begin))
    usual = {kind: sorted(ms)[len(ms) // 2] for kind, ms in of_kind.items() if len(ms) % 2}
    assert usual and all(times.of([e]) == [usual[e.kind]] for e in again if e.step.number == 1 and e.kind in usual)


def test_the_first_step_does_not_count_where_others_are_timed():
    model = sampled()
    times = report.Times(slot.record_of(model))
    assert times.settled == {1}
    only = patched()
    sample(only, only.model.diffusion_model, [1.0])
    assert report.Times(slot.record_of(only)).settled == {0}


def test_errors_and_shares_are_in_it():
    model = patched(network=Network(OldCore(), peaked=1), max_error=0.05)
    sample(model, model.model.diffusion_model, STEPS)
    for entry in slot.record_of(model).entries:
        if entry.layer.name == "block 2" and entry.variant:
            entry._share = 0.2
    data = report.of_model(model)
    errors = {row["layer"]: row["error"] for row in data["layers"] if row["error"] is not None}
    assert errors["block 1"] > 0.05 > errors["block 0"] > 0 and data["left"][PACK.nodes.guard.OFF] == 4
    assert [row["blocks"] for row in data["layers"]] == [None, None, None, None, pytest.approx(0.2), None]
    assert data["map"]["blocks"] == [[1.0] * 4, [None] * 4, [pytest.approx(0.2)] * 4]


def test_the_node_gives_picture_text_and_json_and_passes_on():
    passed = object()
    image, text, as_json, after = nodes["SageAttentionReport"]().execute(sampled(max_error=0.05), passed)["result"]
    assert after is passed and image.shape[0] == 1 and image.shape[2:] == (1024, 3) and image.dtype == torch.float32
    assert 0 <= float(image.min()) < 0.3 and float(image.max()) == 1
    assert "4 steps, 24 attention calls: reference 12, the model's own 12." in text and "1x2x200x20x64" in text
    assert json.loads(as_json)["calls"] == 24
    changed = nodes["SageAttentionReport"].IS_CHANGED(model=None)
    assert changed != changed  # never from ComfyUI's cache


def test_the_picture_grows_with_what_there_is_to_say():
    empty = PACK.nodes.report_picture.draw(report.of_model(patched()))
    full = PACK.nodes.report_picture.draw(report.of_model(sampled(max_error=0.05)))
    assert empty.width == full.width == 1024 and empty.height < 200 < 600 < full.height
    many = report.of_model(sampled())
    many["layers"] = [{**many["layers"][0], "layer": f"block {i}"} for i in range(300)]
    many["map"] = {"layers": [f"block {i}" for i in range(300)], "steps": list(range(200)), "blocks": [[0.5] * 200] * 300}
    assert PACK.nodes.report_picture.draw(many).width == 1024


def test_a_model_that_was_not_patched_or_not_sampled():
    bare = Model()
    bare.model = torch.nn.Module()
    assert findings.of_model(bare) == ["No node of ours has patched this model."]
    (said,) = findings.of_model(patched())
    assert "not been sampled" in said and "comes out of the sampler" in said


def test_a_model_with_an_attention_of_its_own():
    model = patched()
    sample(model, lambda options: QKV[0])
    (said,) = findings.of_model(model)
    assert "never called ComfyUI's attention" in said and "Nunchaku" in said


def someone_else_s(func, *args, **kwargs):
    return func(*args, **kwargs)


def test_another_override_in_front_behind_or_instead():
    model = patched()
    covered = with_model(model.clone(), model)
    covered.options[KEY] = someone_else_s
    sample(covered, covered.model.diffusion_model, [1.0])
    (said,) = findings.of_model(covered)
    assert "someone_else_s of" in said and "has not called ours" in said

    model = patched()
    before = Model(someone_else_s)
    behind = with_model(nodes["PatchSageAttention"]().execute(before, REFERENCE)[0], model)
    sample(behind, behind.model.diffusion_model, [1.0])
    assert findings.of_model(behind) == [f"What our nodes leave goes to another pack's attention patch, {findings.name(someone_else_s)}."]

    del behind.options[KEY]
    assert findings.of_model(behind)[0].startswith("Our patch is gone")
    foreign = with_model(Model(someone_else_s), model)
    assert "someone_else_s" in findings.of_model(foreign)[0]


def test_nothing_that_ran_is_said():
    model = patched("auto")
    sample(model, model.model.diffusion_model, [1.0])
    assert findings.of_model(model) == ["Nothing ran on our kernels; the reasons are listed below."]
    assert OWN in report.of_model(model)["ran"]


def test_the_start_flag_and_a_checkpoint_s_own_attention_are_told(monkeypatch):
    attention = ModuleType("comfy.ldm.modules.attention")
    attention.optimized_attention = SimpleNamespace(__name__="attention_sage")
    monkeypatch.setitem(sys.modules, "comfy.ldm.modules.attention", attention)
    bare = Model()
    bare.model = torch.nn.Module()
    assert findings.of_model(bare)[1:] == ["The start flag is set: all models run on sageattention, this one too."]
    assert findings.of_model(sampled())[0].startswith("The start flag is set: what our nodes leave")

    attention.optimized_attention = SimpleNamespace(__name__="attention_pytorch")
    network = Network(OldCore())
    network.layer = torch.nn.Module()
    network.layer.config = {"attention": "comfy_kitchen_int8"}
    for model, said in ((Model(), "and gets it"), (patched(), "the patch takes its place")):
        model.model = network
        assert any("comfy_kitchen_int8" in line and said in line for line in findings.of_model(model))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    folder_paths = ModuleType("folder_paths")
    folder_paths.get_user_directory = lambda: str(tmp_path / "user")
    folder_paths.get_temp_directory = lambda: str(tmp_path / "temp")
    monkeypatch.setitem(sys.modules, "folder_paths", folder_paths)
    answer = nodes["SageAttentionReport"]().execute(sampled())
    (image,) = answer["ui"]["images"]
    assert (tmp_path / "temp" / image["filename"]).is_file() and image["type"] == "temp"
    return tmp_path, answer["result"]


def command(*arguments: str, cwd) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    arguments = [sys.executable, "-m", "sageattention", "report", *arguments]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")


def test_the_command_line_prints_the_saved_report(saved):
    folder, (_, text, as_json, _) = saved
    (folder / "custom_nodes").mkdir()
    done = command(cwd=folder / "custom_nodes")  # in a folder of the ComfyUI
    assert done.returncode == 0 and done.stdout.strip() == text.strip()
    done = command("--json", str(folder / "user" / "__sageattention" / "report.json"), cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout) == json.loads(as_json)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "can't be read"), ("{", "can't be read"), ('{"format": 99}', "format is 99"), ("[]", "can't be read")]
)
def test_a_file_that_is_no_report(content, said, tmp_path):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    done = command(str(path), cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_no_report_anywhere(tmp_path):
    done = command(cwd=tmp_path)
    assert done.returncode == 2 and "Sage Attention Report" in done.stderr
