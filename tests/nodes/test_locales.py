"""Translations cover what the nodes say, and nothing that they no longer say."""

from __future__ import annotations

import json
from typing import Any

import node_texts
import pytest


def texts(language: str) -> dict[str, Any]:
    return json.loads(node_texts.path(language).read_text(encoding="utf-8"))


def leaves(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    if isinstance(tree, str):
        return {path: tree}
    return {key: value for name, branch in tree.items() for key, value in leaves(branch, (*path, name)).items()}


def test_english_is_what_the_nodes_say():
    assert texts("en") == node_texts.english()  # `python tests/node_texts.py` writes it


@pytest.mark.parametrize("language", [language for language in node_texts.LANGUAGES if language != "en"])
def test_translations_are_whole(language):
    english, translated = leaves(texts("en")), leaves(texts(language))
    # A machine's own texts have no English ones to look up, yet may be translated.
    own = {(node, *(("inputs", what, "tooltip") if what != "description" else (what,))) for node, what in node_texts.OF_THIS_MACHINE}
    assert english.keys() - translated.keys() == set()
    assert translated.keys() - english.keys() <= own
    for path, text in translated.items():
        if path[-1] in ("tooltip", "description"):
            assert any("\u4e00" <= c <= "\u9fff" for c in text) and text != english.get(path), path
            assert len(text.splitlines()) <= 6, path
