"""What is logged or printed can be shown by every console: ComfyUI's log on Windows is often in a legacy code page, with strict errors."""

from __future__ import annotations

import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IN_A_BROWSER = {"nodes/patch.py"}  # tooltips, which reach nobody's console


def sources() -> list[str]:
    files = [path for folder in ("sageattention", "nodes", "installer", "wheels", "csrc/tools") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / name for name in ("__init__.py", "install.py", "prestartup_script.py", "dev.py")]
    return sorted({path.relative_to(ROOT).as_posix() for path in files} - IN_A_BROWSER)


def texts(source: str) -> list[tuple[int, str]]:
    """(line, token) of every text that is more than a docstring."""
    found, statement = [], True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            statement = statement or token.type != tokenize.NL
            continue
        text = token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
        if text and not statement:
            found.append((token.start[0], token.string))
        statement = False
    return found


@pytest.mark.parametrize("name", sources())
def test_every_text_is_ascii(name):
    odd = [f"{name}:{line}: {text}" for line, text in texts((ROOT / name).read_text(encoding="utf-8")) if not text.isascii()]
    assert not odd, "\n".join(odd)


def test_a_text_is_told_from_a_docstring():
    source = '"""Doc ≥"""\n\n\ndef f():\n    """Doc ≥"""\n    # ≥\n    return [\n        "a ≥",\n        f"b {1} ≥",\n    ]\n'
    assert [line for line, text in texts(source) if not text.isascii()] == [8, 9]
