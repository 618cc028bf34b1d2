"""README.md against the package: its tables hold what the planner does, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sageattention.kernels.architectures import ARCHITECTURES
from sageattention.planning.measured import MEASURED
from sageattention.planning.rules import CANDIDATES
from sageattention.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_table_of_cards_is_that_of_auto(arch):
    """In the row of each card its candidates, SDPA last, and what predictions rest on."""
    cells = next(line for line in README.splitlines() if f"| {arch // 10}.{arch % 10} |" in line).strip("| ").split(" | ")
    cards = ARCHITECTURES[arch].cards
    assert cells[0] == cards
    assert re.findall("`([^`]+)`", cells[2]) == [*map(str, CANDIDATES[arch]), "sdpa"]
    assert cells[3] == ("measured" if arch in MEASURED else "static")


def test_every_variant_is_described():
    for name in VARIANTS:
        assert f"`{name}`" in README, name


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
