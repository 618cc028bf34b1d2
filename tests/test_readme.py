"""README.md against the package: its tables hold what the planner does, its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sageattention.capability import Capability
from sageattention.cli.doctor import CARDS, auto_choice
from sageattention.inputs import SHAPES
from sageattention.plan import MIN_AUTO_TOKENS
from sageattention.variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", CARDS)
def test_the_table_of_cards_is_what_auto_does(arch):
    row = next(line for line in README.splitlines() if f"| {arch // 10}.{arch % 10} |" in line)
    assert row.startswith(f"| {CARDS[arch]} |")
    chosen = auto_choice(SHAPES["wan_480p"], Capability("cuda", arch, 100, "native", CARDS[arch]))["variant"]
    assert f"| `{chosen}` |" in row


def test_every_variant_is_described():
    for name in VARIANTS:
        assert f"`{name}`" in README, name


def test_the_shortest_length_is_right():
    assert f"{MIN_AUTO_TOKENS:,} tokens" in README


def test_links_to_files_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
