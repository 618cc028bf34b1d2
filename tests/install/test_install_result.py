"""The node shows what install.py reported."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from pack import load_pack

PATCH = load_pack().nodes.patch


@pytest.fixture
def result(tmp_path, monkeypatch):
    """Writes a result file into a user directory."""
    monkeypatch.setitem(sys.modules, "folder_paths", SimpleNamespace(get_user_directory=lambda: str(tmp_path)))
    (tmp_path / "__sageattention").mkdir()
    return (tmp_path / "__sageattention" / "install.json").write_text


def test_without_comfyui_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.delitem(sys.modules, "folder_paths", raising=False)
    assert PATCH.description() == PATCH.DESCRIPTION


def test_the_message_is_shown(result):
    result(json.dumps({"python": sys.executable, "message": "sageattention 2.2.0 IS BROKEN", "time": "2026-11-22T12:00:00Z"}))
    assert PATCH.description().startswith(PATCH.DESCRIPTION)
    assert "2026-11-22T12:00:00Z:\nsageattention 2.2.0 IS BROKEN" in PATCH.description()
    assert "another Python" not in PATCH.description()


def test_another_python_is_named(result):
    result(json.dumps({"python": "/elsewhere/python", "message": "installed"}))
    assert "another Python, /elsewhere/python" in PATCH.description() and sys.executable in PATCH.description()


def test_no_result_and_a_damaged_one(result):
    assert "has not run" in PATCH.description()
    for text in ("", "[]", "{}", "null"):
        result(text)
        assert "can't be read" in PATCH.description()
