"""Records that `pytest -m gpu tests` passed with the images of this checkout on a card of an architecture:

    python csrc/tools/prove.py 90

writes sageattention/kernels/proven.py. Until then, and after any change to its images, cards of the architecture verify them.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from sageattention.kernels import proven  # noqa: E402


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", type=int, help="10 * major + minor of the compute capability, such as 90")
    family = parser.parse_args().family
    found = proven.digest(family)
    if not found:
        parser.error(f"there are no images of {family}")
    rows = "".join(f'\n    {name}: "{digest}",' for name, digest in sorted((proven.PROVEN | {family: found}).items()))
    file = Path(proven.__file__)
    text = re.sub(r"(PROVEN: dict\[int, str\] = )\{[^}]*\}", rf"\g<1>{{{rows}\n}}", file.read_text(encoding="utf-8"))
    file.write_text(text, encoding="utf-8")
    print(f"{family}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
