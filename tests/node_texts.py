"""The nodes' texts as ComfyUI's front end looks them up by language.

English ones are what the nodes say: `python tests/node_texts.py` writes locales/en/nodeDefs.json from them. Those of other languages are
written by hand, and tests compare what they cover.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pack import ROOT, load_pack

FOLDER = ROOT / "locales"
LANGUAGES = ("en", "zh")
# What differs from machine to machine is not looked up: in English the front end then shows what the node says itself.
OF_THIS_MACHINE = {("PatchSageAttention", "description"), ("PatchSageAttention", "variant")}


def path(language: str) -> Path:
    return FOLDER / language / "nodeDefs.json"


def english() -> dict[str, Any]:
    """Node → its texts, as nodeDefs.json has them. A dot in an input's name is an underscore there."""
    pack = load_pack()
    found = {}
    for name, node in pack.NODE_CLASS_MAPPINGS.items():
        texts: dict[str, Any] = {"display_name": node.DISPLAY_NAME}
        if (name, "description") not in OF_THIS_MACHINE:
            texts["description"] = node.DESCRIPTION
        inputs = node.INPUT_TYPES()
        texts["inputs"] = {
            key.replace(".", "_"): {"name": spec[1].get("display_name", key)}
            | ({} if (name, key) in OF_THIS_MACHINE else {"tooltip": spec[1]["tooltip"]})
            for group in ("required", "optional")
            for key, spec in inputs.get(group, {}).items()
        }
        names = getattr(node, "RETURN_NAMES", ())
        if names:
            texts["outputs"] = {str(i): {"name": label} for i, label in enumerate(names)}
        found[name] = texts
    return found


if __name__ == "__main__":
    path("en").write_text(json.dumps(english(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
