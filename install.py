"""Install hook: puts the bundled `sageattention` and its compiled launcher into the Python that runs this file.

    python install.py [--dry-run | --print | --uninstall | --wheel FOLDER] [--replace] [--with-triton] [--index PATH_OR_URL] [--json]

The nodes always use the package that lies beside this file; an installed copy serves ComfyUI's --use-sage-attention and other
node packs. So nothing here has to succeed: where it does not, Python is left as it was and the message says why.

The package is written as a wheel from the folder beside this file, a launcher's wheel is checked against the index (size, sha256).
It is unpacked into a folder of its own in site-packages, and renames swap it with the installed one, so that killing this at any
point leaves the old or the new one. A child process proves the new one, or the renames are taken back.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.dont_write_bytecode = True  # nothing is written into the pack
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # the embedded Python of Windows does not look here

from installer import Problem  # noqa: E402
from installer.hook import Hook  # noqa: E402
from installer.wheel import Bundle  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install the bundled sageattention into this Python.")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--print", action="store_true", help="only show the commands that would do it by hand")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--index", help="another index.json: a path, a folder, or an https URL")
    parser.add_argument("--replace", action="store_true", help="put ours in the place of a sageattention from elsewhere, or a newer one")
    parser.add_argument("--with-triton", action="store_true", help="on Windows: install the triton-windows that fits torch")
    parser.add_argument("--uninstall", action="store_true", help="remove what this file installed")
    parser.add_argument("--wheel", type=Path, metavar="FOLDER", help="only write the package's wheel into that folder")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one download (60)")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # paths may hold what a console can't show
    if args.wheel:
        return write_wheel(args.wheel)
    hook = Hook(args)
    code = hook.work()
    hook.save()
    if args.json:
        print(json.dumps(hook.result))
    else:
        print("\n".join(line if args.print else f"[sageattention] {line}" for line in hook.result["message"].splitlines()))
    return code


def write_wheel(folder: Path) -> int:
    try:
        print(Bundle().bring(folder))
    except (Problem, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
