"""The example workflows, described once, and written into example_workflows/ in ComfyUI's two forms: for its front end and for its API.

    python tests/examples.py COMFYUI_PATH

takes the definitions of nodes from a server of that ComfyUI, run by this Python. Any core that knows the nodes gives the same files.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / "example_workflows"
NOTE = "MarkdownNote"  # of the front end alone
COLUMN, GAP, LEFT, TOP = 350, 40, 40, 80
SHOW_PICTURES = ("SaveImage", "SaveVideo", "SageAttentionReport")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NESTED = "COMFY_DYNAMICCOMBO_V3"
Link = tuple[str, int]  # a node's name, and the number of its output


@dataclass(frozen=True)
class Node:
    """A node: its class, the column it stands in, and its inputs: values, or links to other nodes."""

    type: str
    column: int
    inputs: dict[str, Any]
    title: str = ""


class Workflow(NamedTuple):
    """A workflow, and what its note says."""

    note: str
    nodes: dict[str, Node]


def _patched(source: Link, column: int, sparse: bool) -> dict[str, Node]:
    nodes = {"patch": Node("PatchSageAttention", column, {"model": source, "variant": "auto"})}
    if sparse:
        nodes["sparse"] = Node(
            "SageSparseAttention", column,
            {"model": ("patch", 0), "selection": "mass", "selection.tau": 2.0, "start_percent": 0.2, "end_percent": 1.0},
        )  # fmt: skip
    return nodes


def _report(model: Link, column: int) -> dict[str, Node]:
    return {"report": Node("SageAttentionReport", column, {"model": model, "after": ("sampler", 0)})}


def _sampler(model: Link, column: int, steps: int, cfg: float, **others: Any) -> Node:
    settings = {"seed": 42, "steps": steps, "cfg": cfg, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0} | others
    links = {"model": model, "positive": ("positive", 0), "negative": ("negative", 0), "latent_image": ("latent", 0)}
    return Node("KSampler", column, links | settings)


def _prompts(clip: Link, positive: str, negative: str) -> dict[str, Node]:
    return {
        "positive": Node("CLIPTextEncode", 1, {"clip": clip, "text": positive}, "Prompt"),
        "negative": Node("CLIPTextEncode", 1, {"clip": clip, "text": negative}, "Negative prompt"),
    }


def _picture(column: int, vae: Link) -> dict[str, Node]:
    return {
        "decoded": Node("VAEDecode", column, {"samples": ("sampler", 0), "vae": vae}),
        "saved": Node("SaveImage", column, {"images": ("decoded", 0), "filename_prefix": "sage"}),
    }


def _video(column: int, vae: Link, fps: float) -> dict[str, Node]:
    return {
        "decoded": Node("VAEDecode", column, {"samples": ("sampler", 0), "vae": vae}),
        "video": Node("CreateVideo", column, {"images": ("decoded", 0), "fps": fps}),
        "saved": Node("SaveVideo", column, {"video": ("video", 0), "filename_prefix": "video/sage", "format": "auto", "codec": "auto"}),
    }


def _loaders(unet: str, clip: str, kind: str, vae: str) -> dict[str, Node]:
    return {
        "model": Node("UNETLoader", 0, {"unet_name": unet, "weight_dtype": "default"}),
        "clip": Node("CLIPLoader", 0, {"clip_name": clip, "type": kind}),
        "vae": Node("VAELoader", 0, {"vae_name": vae}),
    }


FOX = "a red fox runs through fresh snow between birches, low sun, breath in the cold air"
BLUR = "blurry, low quality, distorted"
PICTURE = (
    "**Patch Sage Attention** makes the model faster; nothing else in the workflow changes. Put it anywhere between the loader and the "
    "sampler. The report shows what ran."
)
VIDEO = (
    "**Patch Sage Attention** makes all attention faster, **Patch Sage Sparse Attention** the long one of video: it computes the blocks "
    "that matter. Raise *tau* for speed, lower it for detail; *start_percent* keeps the first steps as they are, which decide the "
    "composition. The report shows what ran."
)

WORKFLOWS = {
    "sdxl": Workflow(PICTURE, {
        "checkpoint": Node("CheckpointLoaderSimple", 0, {"ckpt_name": "sd_xl_base_1.0.safetensors"}),
        **_prompts(("checkpoint", 1), FOX, BLUR),
        "latent": Node("EmptyLatentImage", 1, {"width": 1024, "height": 1024, "batch_size": 1}),
        **_patched(("checkpoint", 0), 2, sparse=False),
        "sampler": _sampler(("patch", 0), 3, 30, 6.5, scheduler="karras", sampler_name="dpmpp_2m"),
        **_picture(4, ("checkpoint", 2)),
        **_report(("patch", 0), 5),
    }),
    "flux": Workflow(PICTURE, {
        "model": Node("UNETLoader", 0, {"unet_name": "flux1-dev.safetensors", "weight_dtype": "default"}),
        "clip": Node("DualCLIPLoader", 0, {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}),
        "vae": Node("VAELoader", 0, {"vae_name": "ae.safetensors"}),
        "text": Node("CLIPTextEncode", 1, {"clip": ("clip", 0), "text": FOX}, "Prompt"),
        "positive": Node("FluxGuidance", 1, {"conditioning": ("text", 0), "guidance": 3.5}),
        "negative": Node("ConditioningZeroOut", 1, {"conditioning": ("text", 0)}),
        "latent": Node("EmptySD3LatentImage", 1, {"width": 1024, "height": 1024, "batch_size": 1}),
        **_patched(("model", 0), 2, sparse=False),
        "sampler": _sampler(("patch", 0), 3, 20, 1.0),
        **_picture(4, ("vae", 0)),
        **_report(("patch", 0), 5),
    }),
    "qwen_image": Workflow(PICTURE, {
        **_loaders(
            "qwen_image_fp8_e4m3fn.safetensors", "qwen_2.5_vl_7b_fp8_scaled.safetensors", "qwen_image", "qwen_image_vae.safetensors"
        ),
        **_prompts(("clip", 0), FOX, ""),
        "latent": Node("EmptySD3LatentImage", 1, {"width": 1328, "height": 1328, "batch_size": 1}),
        "shifted": Node("ModelSamplingAuraFlow", 2, {"model": ("model", 0), "shift": 3.1}),
        **_patched(("shifted", 0), 2, sparse=False),
        "sampler": _sampler(("patch", 0), 3, 20, 2.5),
        **_picture(4, ("vae", 0)),
        **_report(("patch", 0), 5),
    }),
    "wan_video_sparse": Workflow(VIDEO, {
        **_loaders("wan2.1_t2v_14B_fp16.safetensors", "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan", "wan_2.1_vae.safetensors"),
        **_prompts(("clip", 0), FOX, BLUR),
        "latent": Node("EmptyHunyuanLatentVideo", 1, {"width": 1280, "height": 720, "length": 81, "batch_size": 1}),
        "shifted": Node("ModelSamplingSD3", 2, {"model": ("model", 0), "shift": 8.0}),
        **_patched(("shifted", 0), 2, sparse=True),
        "sampler": _sampler(("sparse", 0), 3, 20, 6.0, sampler_name="uni_pc"),
        **_video(4, ("vae", 0), 16.0),
        **_report(("sparse", 0), 5),
    }),
    "ltx_video_sparse": Workflow(VIDEO, {
        "checkpoint": Node("CheckpointLoaderSimple", 0, {"ckpt_name": "ltxv-13b-0.9.8-dev-fp8.safetensors"}),
        "clip": Node("CLIPLoader", 0, {"clip_name": "t5xxl_fp16.safetensors", "type": "ltxv"}),
        "prompt": Node("CLIPTextEncode", 1, {"clip": ("clip", 0), "text": FOX}, "Prompt"),
        "negative_prompt": Node("CLIPTextEncode", 1, {"clip": ("clip", 0), "text": BLUR}, "Negative prompt"),
        "positive": Node(
            "LTXVConditioning", 1, {"positive": ("prompt", 0), "negative": ("negative_prompt", 0), "frame_rate": 25.0}
        ),
        "latent": Node("EmptyLTXVLatentVideo", 1, {"width": 1216, "height": 704, "length": 121, "batch_size": 1}),
        **_patched(("checkpoint", 0), 2, sparse=True),
        "steps": Node(
            "LTXVScheduler", 3,
            {"steps": 30, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1, "latent": ("latent", 0)},
        ),
        "method": Node("KSamplerSelect", 3, {"sampler_name": "euler"}),
        "sampler": Node(
            "SamplerCustom", 3,
            {"model": ("sparse", 0), "add_noise": True, "noise_seed": 42, "cfg": 3.0, "positive": ("positive", 0),
             "negative": ("positive", 1), "sampler": ("method", 0), "sigmas": ("steps", 0), "latent_image": ("latent", 0)},
        ),
        **_video(4, ("checkpoint", 2), 25.0),
        **_report(("sparse", 0), 5),
    }),
}  # fmt: skip


def api_form(workflow: Workflow) -> dict[str, Any]:
    """As a program posts it to /prompt."""
    numbers = {name: str(i) for i, name in enumerate(workflow.nodes, 1)}

    def value(given: Any) -> Any:
        return [numbers[given[0]], given[1]] if isinstance(given, tuple) else given

    return {
        numbers[name]: {
            "class_type": node.type,
            "inputs": {key: value(given) for key, given in node.inputs.items()},
            "_meta": {"title": node.title or node.type},
        }
        for name, node in workflow.nodes.items()
    }


def ui_form(name: str, workflow: Workflow, info: dict[str, Any]) -> dict[str, Any]:
    """As the front end saves it.

    Args:
        info: definitions of nodes, as /object_info has them.
    """
    numbers = {key: i for i, key in enumerate(workflow.nodes, 1)}
    links: list[list[Any]] = []
    drawn: dict[str, dict[str, Any]] = {}
    bottom: dict[int, int] = {}
    for key, node in workflow.nodes.items():
        slots = [(slot, kind) for slot, kind, _ in inputs_of(info[node.type]) if kind not in (*WIDGETS, NESTED)]
        outputs = info[node.type]["output"]
        values = list(widget_values(node, info[node.type]))
        lines = sum(6 if isinstance(v, str) and len(v) > 60 else 1 for v in values)
        size = [COLUMN - GAP, 40 + 22 * max(len(slots), len(outputs)) + 26 * lines + (300 if node.type in SHOW_PICTURES else 0)]
        top = bottom.get(node.column, TOP)
        bottom[node.column] = top + size[1] + GAP + 30
        drawn[key] = {
            "id": numbers[key], "type": node.type, "pos": [LEFT + COLUMN * node.column, top], "size": size, "flags": {},
            "order": numbers[key] - 1, "mode": 0,
            "inputs": [{"name": slot, "type": kind, "link": None} for slot, kind in slots],
            "outputs": [
                {"name": label, "type": kind, "links": []} for label, kind in zip(info[node.type]["output_name"], outputs)
            ],
            "properties": {"Node name for S&R": node.type}, "widgets_values": values,
        }  # fmt: skip
        if node.title:
            drawn[key]["title"] = node.title
    for key, node in workflow.nodes.items():
        for i, slot in enumerate(drawn[key]["inputs"]):
            if isinstance(node.inputs.get(slot["name"]), tuple):
                source, number = node.inputs[slot["name"]]
                output = drawn[source]["outputs"][number]
                links.append([len(links) + 1, numbers[source], number, numbers[key], i, output["type"]])
                slot["link"] = links[-1][0]
                output["links"].append(links[-1][0])
    if workflow.note:
        drawn[NOTE] = {
            "id": len(numbers) + 1, "type": NOTE, "pos": [LEFT + 2 * COLUMN, bottom.get(2, TOP)], "size": [COLUMN - GAP, 220],
            "flags": {}, "order": len(numbers), "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [workflow.note],
        }  # fmt: skip
    return {
        "id": f"sage-{name}", "revision": 0, "last_node_id": len(drawn), "last_link_id": len(links), "nodes": [*drawn.values()],
        "links": links, "groups": [], "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def inputs_of(definition: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of a node's inputs, in order."""
    found = []
    for group in ("required", "optional"):
        for name, (kind, *options) in definition["input"].get(group, {}).items():
            found.append((name, "COMBO" if isinstance(kind, list) else str(kind), {"choices": kind} | (options[0] if options else {})))
    return found


def widget_values(node: Node, definition: dict[str, Any]) -> Any:
    """Values of the widgets, as the front end lists them. What a core without nested inputs shows behind the others keeps its default."""
    for name, kind, options in inputs_of(definition):
        if kind == NESTED:
            chosen = node.inputs[name]
            yield chosen
            (inner,) = (option["inputs"] for option in options["options"] if option["key"] == chosen)
            for key, spec in {**inner.get("required", {}), **inner.get("optional", {})}.items():
                yield node.inputs.get(f"{name}.{key}", spec[1]["default"])
        elif kind in WIDGETS and not options.get("forceInput"):
            if name.startswith("selection.") and name not in node.inputs:
                continue
            choices = options.get("options") or options["choices"]
            default = options.get("default", choices[0] if kind == "COMBO" and choices else "")
            yield node.inputs.get(name, default)
            if options.get("control_after_generate"):
                yield "fixed"


def problems(workflow: dict[str, Any], info: dict[str, Any]) -> list[str]:
    """What is wrong with a workflow in API form: nodes, inputs and outputs that do not exist, types that do not fit, values out of range.
    File names are not looked at."""
    found = []
    for number, node in workflow.items():
        definition = info.get(node["class_type"])
        if definition is None:
            found.append(f"{number}: no node {node['class_type']}")
            continue
        known = {name: (kind, options) for name, kind, options in inputs_of(definition)}
        for name, value in node["inputs"].items():
            if name not in known and name.partition(".")[0] not in known:
                found.append(f"{number}: {node['class_type']} has no input {name}")
            elif name in known:
                found += [f"{number}: {node['class_type']}.{name}: {why}" for why in _wrong(value, *known[name], workflow, info)]
        missing = definition["input"].get("required", {}).keys() - node["inputs"].keys()
        found += [f"{number}: {node['class_type']} lacks {name}" for name in missing]
    return found


def _wrong(value: Any, kind: str, options: dict[str, Any], workflow: dict[str, Any], info: dict[str, Any]) -> list[str]:
    if isinstance(value, list):
        made = info.get(workflow[value[0]]["class_type"], {"output": []})["output"]
        if value[1] >= len(made):
            return ["no such output"]
        return [] if kind in ("*", made[value[1]]) else [f"takes {kind}, gets {made[value[1]]}"]
    if kind in ("INT", "FLOAT"):
        fits = options.get("min", -math.inf) <= value <= options.get("max", math.inf)
        return [] if fits else [f"{value} is out of range"]
    if kind == "COMBO":
        choices = options.get("options") or options["choices"]
        if isinstance(value, str) and value.endswith(".safetensors"):
            return []
        return [] if value in choices else [f"{value!r} is not among {choices}"]
    return []


def files(info: dict[str, Any]) -> dict[str, str]:
    """Path in example_workflows → text, of all workflows in both forms."""
    made: dict[str, Any] = {}
    for name, workflow in WORKFLOWS.items():
        made[f"{name}.json"] = ui_form(name, workflow, info)
        made[f"api/{name}.json"] = api_form(workflow)
    return {path: json.dumps(form, indent=1) + "\n" for path, form in made.items()}


def main() -> None:
    from comfy_server import serving

    with tempfile.TemporaryDirectory() as base, serving(Path(sys.argv[1]), Path(base) / "comfyui") as server:
        info = server.get("/object_info")
    (FOLDER / "api").mkdir(parents=True, exist_ok=True)
    for path, text in files(info).items():
        (FOLDER / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
