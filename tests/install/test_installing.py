"""The installer tests' own helpers: what deletes files must know where."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import installing
import pytest
from installing import ROOT


def test_a_legacy_code_page_does_not_make_the_tests_delete_the_current_folder(tmp_path):
    """A path that cp1252 lacks once came back empty, and the packages of the current folder were deleted as those of the environment."""
    (tmp_path / "sageattention").mkdir()
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\nimport installing, pathlib\n"
        "p = installing.Python(pathlib.Path('env \\u8def').resolve(), pip=False)\np.clean()\nprint(ascii(str(p.site)))"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sageattention").is_dir() and "u8def" in done.stdout


def test_an_environment_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        installing, "run_python", lambda exe, code, **options: subprocess.CompletedProcess([], 0, "" if "find_spec" in code else ".", "")
    )
    with pytest.raises(RuntimeError, match="says that its packages are in"):
        installing.Python(Path(tmp_path / "env"), pip=False)
