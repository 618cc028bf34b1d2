"""Install hook: puts the bundled `sageattention` and its compiled launcher into the Python that runs this file.

    python install.py [--dry-run | --print | --uninstall] [--replace] [--with-triton] [--index PATH_OR_URL] [--json]

The nodes always use the package that lies beside this file; an installed copy serves ComfyUI's --use-sage-attention and other
node packs. So nothing here has to succeed: where it does not, Python is left as it was and the message says why.

Order of an exchange: the wheel is checked against the index (size, sha256) and unpacked by pip, or else uv, into a folder of
its own in site-packages. Renames then swap it with the installed one, while a .pth file keeps the new one importable; so
killing this at any point leaves the old or the new one. A child process proves the new one, or the renames are undone.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import http.client
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.parse
import urllib.request
import zipfile
from pathlib import Path

PACK = Path(os.path.abspath(__file__)).parent
PACKAGE, LAUNCHER = "sageattention", "sageattention-launcher"
KEYWORD = "sageattention-node-pack"  # in the metadata of our wheels, of nobody else's
WHEEL = re.compile(r"(sageattention|sageattention_launcher)-(\d+\.\d+\.\d+)-([\w.]+)-([\w.]+)-([\w.]+)\.whl", re.ASCII)
MAX_WHEEL, MAX_INDEX = 64 << 20, 1 << 20  # bytes
LOOPBACK = ("127.0.0.1", "localhost", "::1")
WORK, FALLBACK = ".sageattention-install", "sageattention-install.pth"  # in site-packages, during an exchange only
PROBE = "import sageattention as s; s.sageattn; print('\\n@' + s.__file__)"
PROBE_LAUNCHER = "import sageattention_launcher as s; s.__version__; print('\\n@' + s.__file__)"


class Problem(Exception):
    """What can't be done, why, and what to do. Nothing has changed."""


# ---------------------------------------------------------------------------------------------- this Python
def supported_tags() -> list[str]:
    """Wheel tags that this interpreter takes, best first."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    abi = python + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else "")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    platforms = [platform]
    if platform.startswith("linux_"):
        try:
            name, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
        except (AttributeError, ValueError, OSError):  # not glibc: no manylinux
            name, version = "", ""
        newest = int(version.split(".")[1]) if name == "glibc" else 0
        platforms = [f"manylinux_2_{minor}_{platform[6:]}" for minor in range(newest, 16, -1)]
    compiled = sys.implementation.name == "cpython" and sys.maxsize > 2**32
    return [f"{python}-{abi}-{p}" for p in platforms if compiled] + ["py3-none-any"]


def python_command() -> list[str]:
    """This interpreter; without the user's site-packages where it was started so, and always for the embedded one of Windows."""
    embedded = "python_embeded" in sys.executable or any(Path(sys.executable).parent.glob("python*._pth"))
    return [sys.executable, *(["-s"] if embedded or sys.flags.no_user_site else [])]


def installer(verb: str) -> list[str]:
    """`pip install` (or another verb) of this interpreter, else uv's."""
    if importlib.util.find_spec("pip"):
        return [*python_command(), "-m", "pip", "--disable-pip-version-check", "--no-input", verb]
    for uv in ([*python_command(), "-m", "uv"] if importlib.util.find_spec("uv") else None, [shutil.which("uv")]):
        if uv and uv[0]:
            return [*uv, "pip", verb, "--python", sys.executable]
    raise Problem(f"{sys.executable} has neither pip nor uv: run its `-m ensurepip`, then this file again.")


def run(command: list[str], timeout: float = 900) -> subprocess.CompletedProcess:
    """A child with an empty working folder, so that Python finds there neither this pack nor anything else."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(command, cwd=empty, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=timeout)


def probe(code: str) -> tuple[str | None, str]:
    """Import in a child. Returns the module's file, or None and the cause. The import may print, too."""
    try:
        child = run([*python_command(), "-c", code], timeout=180)
    except subprocess.TimeoutExpired:
        return None, "the import does not return"
    file = next((line[1:] for line in child.stdout.splitlines() if line.startswith("@")), None)
    if child.returncode == 0 and file:
        return file, ""
    if child.returncode <= 0 or not child.stderr.strip():
        return None, f"the import ends Python with code {child.returncode}"
    return None, child.stderr.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- what is installed
class Installed:
    """A distribution, or a bare package folder, that this Python finds first.

    Attributes: folder (its site-packages), version (None for a bare folder), ours, record (its RECORD's rows), entries (what it owns
    in its folder, or None where that can't be told).
    """

    def __init__(self, name: str, folder: Path, distribution: importlib.metadata.Distribution | None):
        module = name.replace("-", "_")
        self.folder, self.version, self.ours, self.record = folder, None, False, []
        self.entries = [module] if distribution is None and (folder / module).is_dir() else None
        if distribution is None:
            return
        self.version, keywords = field(distribution, "Version"), field(distribution, "Keywords")
        self.ours = name == LAUNCHER or KEYWORD in (keywords or "")
        self.record = [row for row in csv.reader(io.StringIO(distribution.read_text("RECORD") or "")) if row]
        if self.record:
            tops = {Path(row[0]).parts[0] for row in self.record if not os.path.isabs(row[0])} - {"..", "__pycache__"}
            self.entries = sorted(top for top in tops if top.lower().startswith(module) or (folder / top).is_file())

    def intact(self) -> bool:
        """Whether every file that was recorded is there with its size."""
        files = [(self.folder / row[0], row[2]) for row in self.record if row[2]]
        return bool(files) and all(path.is_file() and path.stat().st_size == int(size) for path, size in files)

    def is_build(self, wheel: Path | None) -> bool:
        """Whether it came from this very wheel; true where the wheel is not at hand."""
        if wheel is None:
            return True
        try:
            with zipfile.ZipFile(wheel) as archive:
                record = next(name for name in archive.namelist() if name.endswith(".dist-info/RECORD"))
                rows = csv.reader(io.StringIO(archive.read(record).decode("utf-8")))
        except zipfile.BadZipFile:
            return False  # and the check against the index will say more
        return {tuple(row[:2]) for row in rows if row and row[1]} <= {tuple(row[:2]) for row in self.record}

    def fingerprint(self) -> list:
        """Changes when it, torch or this Python does."""
        stamps = [(self.folder / entry).stat().st_mtime_ns for entry in self.entries or () if (self.folder / entry).exists()]
        return [sys.executable, str(self.folder), self.version, torch_version(), *stamps]


def find(name: str) -> Installed | None:
    """The installed distribution of that name, else a package folder of that name without metadata, else None."""
    importlib.invalidate_caches()
    paths = [p for p in sys.path if p and os.path.abspath(p) != str(PACK)]
    for distribution in importlib.metadata.distributions(name=name, path=paths):
        return Installed(name, Path(distribution.locate_file("")), distribution)
    spec = importlib.machinery.PathFinder.find_spec(name.replace("-", "_"), paths)
    if spec is None or not spec.origin:
        return None
    file = Path(spec.origin)
    return Installed(name, file.parent.parent if file.name.startswith("__init__.") else file.parent, None)


def field(distribution: importlib.metadata.Distribution, name: str) -> str | None:
    """A line of its metadata; None where that, or all of it, is missing."""
    match = re.search(
        rf"^{name}: *(\S.*?)\s*$", distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "", re.MULTILINE
    )
    return match[1] if match else None


def torch_version() -> str | None:
    """From its metadata: importing torch takes seconds, and on Windows locks its libraries."""
    return next((field(distribution, "Version") for distribution in importlib.metadata.distributions(name="torch")), None)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


# ---------------------------------------------------------------------------------------------- index and wheels
def origin(url: str) -> tuple[str, str]:
    """Scheme and host with port; refuses all but https, and http on this machine's loopback."""
    parts = urllib.parse.urlsplit(url)
    if not parts.hostname or (parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in LOOPBACK)):
        raise Problem(f"{url!r} is refused: only https is allowed.")
    return parts.scheme, parts.netloc


class SameHost(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req, fp, code, msg, headers, newurl):
        if origin(newurl) != origin(req.full_url):
            raise Problem(f"{req.full_url} redirects to another host, {newurl!r}: refused.")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, limit: int, seconds: float) -> bytes:
    """What is there, as far as `limit` bytes and some, within `seconds` as a whole."""
    deadline, data = time.monotonic() + seconds, b""
    try:
        origin(url)
        with urllib.request.build_opener(SameHost).open(url, timeout=seconds) as answer:
            while len(data) <= limit:
                chunk = answer.read1(1 << 16)
                if not chunk:
                    return data
                data += chunk
                if time.monotonic() > deadline:
                    raise Problem(f"{url}: too slow, given up after {seconds:g} s.")
            return data
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Problem(f"{url}: {error}.") from error


class Index:
    """The wheels that there are; `where` is a folder, an index.json, or its URL. Refused when it names what can't be our wheel."""

    def __init__(self, where: str, seconds: float):
        self.where, self.seconds, self.remote = where, seconds, bool(re.match(r"\w\w+:", where))
        self.file = None if self.remote else Path(where) / "index.json" if Path(where).is_dir() else Path(where)
        try:
            data = download(where, MAX_INDEX, seconds) if self.remote else self.file.read_bytes()
            self.wheels = [self._checked(entry) for entry in json.loads(data)["wheels"]]
        except OSError as error:
            raise Problem(f"The index {where} can't be read: {error}.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Problem(f"The index {where} is not one: {type(error).__name__}: {error}.") from error

    @staticmethod
    def _checked(entry: dict) -> dict:
        match = WHEEL.fullmatch(entry["file"])
        if not match or match[1].replace("_", "-") != entry["name"] or match[2] != entry["version"]:
            raise ValueError(f"{entry['file']!r} is no wheel of {entry['name']!r} {entry['version']!r}")
        if not re.fullmatch("[0-9a-f]{64}", entry["sha256"]) or not 0 < entry["size"] <= MAX_WHEEL:
            raise ValueError(f"{entry['file']} has no proper sha256 and size")
        pythons, abis, platforms = (part.split(".") for part in match.groups()[2:])
        return {**entry, "tags": {f"{p}-{a}-{s}" for p in pythons for a in abis for s in platforms}}

    def best(self, name: str, version: str | None = None) -> dict | None:
        """The newest wheel of that name (and version), by the tags' order among equals; None where nothing fits."""
        order = {tag: rank for rank, tag in enumerate(supported_tags())}
        named = (w for w in self.wheels if w["name"] == name and version in (None, w["version"]))
        ranked = [([-n for n in numbers(w["version"])], order[tag], w) for w in named for tag in w["tags"] & order.keys()]
        return min(ranked, key=lambda r: r[:2])[2] if ranked else None

    def local(self, wheel: dict) -> Path | None:
        """The wheel's file beside the index."""
        path = self.file.parent / wheel["file"] if self.file else None
        return path if path and path.is_file() else None

    def fetch(self, wheel: dict, folder: Path) -> Path:
        """Bring the wheel into `folder`, from the first place that has it as the index describes it."""
        beside, problems = self.local(wheel), []
        urls = [urllib.parse.urljoin(self.where, wheel["file"])] if self.remote else []
        for source in [*([beside] if beside else []), *urls, *wheel.get("urls", ())]:
            try:
                data = source.read_bytes() if source is beside else download(source, wheel["size"], self.seconds)
                if len(data) != wheel["size"] or hashlib.sha256(data).hexdigest() != wheel["sha256"]:
                    raise Problem(f"{source}: {len(data)} bytes that are not the wheel of the index (size or sha256 differ).")
            except Problem as problem:
                problems.append(str(problem))
                continue
            path = folder / wheel["file"]
            path.write_bytes(data)
            return path
        raise Problem(f"{wheel['file']} is not to be had. " + (" ".join(problems) or "The index names no place."))


# ---------------------------------------------------------------------------------------------- exchange
@contextlib.contextmanager
def exclusive(site: Path):
    """The working folder in `site`, held by this process alone; what an interrupted one left is undone first."""
    work = site / WORK
    try:
        work.mkdir(exist_ok=True)
        lock = open(work / "lock", "a+b")  # noqa: SIM115
    except OSError as error:
        raise Problem(f"{site} can't be written ({error.strerror}).") from error
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise Problem(f"Another install is running in {site}.") from error
    try:
        undo(site)
        yield work
    finally:
        lock.close()
        shutil.rmtree(work, ignore_errors=True)


def undo(site: Path) -> None:
    """Take back what an exchange has moved, as its journal tells; does nothing when there was none."""
    work = site / WORK
    if (work / "journal.json").is_file():
        journal = json.loads((work / "journal.json").read_text(encoding="utf-8"))
        for entry in journal["new"]:
            if not (work / "new" / entry).exists() and (site / entry).exists():
                os.rename(site / entry, work / "new" / entry)
        for entry in journal["old"]:
            if (work / "old" / entry).exists():
                os.rename(work / "old" / entry, site / entry)
        (work / "journal.json").unlink()
    (site / FALLBACK).unlink(missing_ok=True)
    for part in ("new", "old"):
        shutil.rmtree(work / part, ignore_errors=True)


def exchange(wheel: Path, old: Installed | None, site: Path, prove) -> None:
    """Install `wheel` in place of `old`. When that, or `prove(site)`, raises Problem, `old` is there as before."""
    with exclusive(site) as work:
        command = installer("install")
        alone = ["--no-config"] if "--python" in command else ["--isolated"]  # a configured --user or --prefix would clash
        child = run([*command, *alone, "--no-deps", "--no-index", "--target", str(work / "new"), str(wheel)])
        if child.returncode:
            raise Problem(f"{wheel.name} could not be unpacked: {(child.stderr or child.stdout).strip()[-800:]}")
        new = sorted(entry.name for entry in (work / "new").iterdir() if entry.name.startswith("sageattention"))
        (work / "old").mkdir()
        journal = work / "journal.json"
        journal.with_suffix(".tmp").write_text(json.dumps({"old": old.entries if old else [], "new": new}), encoding="utf-8")
        os.replace(journal.with_suffix(".tmp"), journal)
        try:
            (site / FALLBACK).write_text(f"{WORK}/new\n", encoding="ascii")  # relative to site-packages
            for entry in old.entries if old else ():
                if (site / entry).exists():
                    os.rename(site / entry, work / "old" / entry)
            for entry in new:
                os.rename(work / "new" / entry, site / entry)
            prove(site)
        except OSError as error:
            undo(site)
            raise Problem(f"{error.filename or site} can't be moved ({error.strerror}). Close ComfyUI and run this again.") from error
        except BaseException:  # also Ctrl-C
            undo(site)
            raise
        journal.unlink()
        (site / FALLBACK).unlink()


def prove_import(module: str, code: str, site: Path) -> None:
    found, cause = probe(code)
    if found is None or not Path(found).resolve().is_relative_to(site.resolve()):
        raise Problem(f"The new {module} does not import: {cause or f'Python takes {found} instead'}. It was taken out again.")


def prove_package(site: Path) -> None:
    prove_import(PACKAGE, PROBE, site)
    doctor = run([*python_command(), "-m", PACKAGE, "doctor", "--json"])
    try:
        json.loads(doctor.stdout[doctor.stdout.find("{") :])
    except ValueError:
        doctor.returncode = doctor.returncode or 1
    if doctor.returncode:
        raise Problem(f"`-m sageattention doctor` fails: {(doctor.stderr or doctor.stdout).strip()[-400:]}. It was taken out again.")


def prove_launcher(site: Path) -> None:
    prove_import(LAUNCHER, PROBE_LAUNCHER, site)


# ---------------------------------------------------------------------------------------------- the hook
def result_file() -> Path | None:
    """Where ComfyUI's user directory is, as far as this process can tell; the node and prestartup_script.py read it there."""
    bases = [os.environ.get("COMFYUI_FOLDERS_BASE_PATH"), PACK.parent.parent if PACK.parent.name == "custom_nodes" else None]
    for base in [*bases, os.environ.get("COMFYUI_PATH")]:
        if base and (Path(base) / "custom_nodes").is_dir():
            return Path(base) / "user" / "__sageattention" / "install.json"
    return None


def health(package: Installed, file: Path | None) -> tuple[bool, str]:
    """Whether a foreign package imports, and the cause where it does not. What the last run found holds as long as nothing changed."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no earlier result, or none that can be read
        known = json.loads(file.read_text(encoding="utf-8"))["installed"] if file else {}
        if known["fingerprint"] == package.fingerprint():
            return known["healthy"], known["cause"]
    found, cause = probe(PROBE)
    return found is not None, cause


class Hook:
    """One run: what it found, did and has to say."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.file, self.lines, self.done = args, result_file(), [], []
        self.site, self.only_say = Path(sysconfig.get_path("purelib")), args.print or args.dry_run
        self.result = {"format": 1, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "python": sys.executable,
                       "pack": self.pack_version(), "torch": torch_version(), "installed": None,
                       "launcher": {"version": None, "why": ""}}  # fmt: skip

    @staticmethod
    def pack_version() -> str:
        text = (PACK / PACKAGE / "_version.py").read_text(encoding="utf-8")
        return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)[1]

    def put(self, index: Index, wheel: dict, old: Installed | None, prove) -> bool:
        """Install a wheel; with --print or --dry-run only say so."""
        if old and (old.entries is None or not os.access(old.folder, os.W_OK)):
            raise Problem(f"{wheel['name']} in {old.folder} can't be written, or was not put there by pip: remove it as it came.")
        if self.args.print:
            source = index.local(wheel) or next(iter(wheel.get("urls", ())), wheel["file"]) + f"#sha256={wheel['sha256']}"
            self.lines.append(subprocess.list2cmdline([*installer("install"), "--no-deps", "--force-reinstall", str(source)]))
            return False
        if self.args.dry_run:
            self.lines.append(f"Would install {wheel['file']} into {old.folder if old else self.site}.")
            return False
        managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
        if sys.prefix == sys.base_prefix and managed.exists() and not os.environ.get("PIP_BREAK_SYSTEM_PACKAGES"):
            raise Problem(f"{sys.executable} belongs to the system ({managed}): use a virtual environment.")
        with tempfile.TemporaryDirectory() as folder:
            exchange(index.fetch(wheel, Path(folder)), old, old.folder if old else self.site, prove)
        self.done.append(f"{wheel['name']} {wheel['version']}")
        return True

    def package(self, index: Index) -> tuple[str, str]:
        """Bring `sageattention` to the wanted state. Returns the outcome, and the version that the launcher must have."""
        old, wheel = find(PACKAGE), index.best(PACKAGE)
        if wheel is None:
            raise Problem(f"{index.where} has no sageattention wheel for this Python ({supported_tags()[0]}).")
        healthy, cause, outcome, newest = True, "", "current", wheel["version"]
        if old and old.ours:
            if numbers(old.version) > numbers(newest) and not self.args.replace:
                outcome = "kept-newer"
                self.lines.append(f"sageattention {old.version} is newer than this pack's {newest} and kept; --replace installs {newest}.")
            wanted = outcome == "current" and not (old.version == newest and old.intact() and old.is_build(index.local(wheel)))
        elif old:
            healthy, cause = health(old, self.file)
            outcome, wanted = "kept-foreign" if healthy else "broken-foreign", self.args.replace
            self.lines += [] if wanted else [self.about_foreign(old, cause)]
        else:
            wanted = True
        if wanted and self.put(index, wheel, old, prove_package):
            outcome, old, healthy, cause = "installed", find(PACKAGE), True, ""
        if old:
            path = old.folder / PACKAGE
            self.result["installed"] = {"version": old.version, "ours": old.ours, "path": str(path), "healthy": healthy, "cause": cause,
                                        "stamp": path.stat().st_mtime_ns if path.exists() else None,
                                        "fingerprint": old.fingerprint()}  # fmt: skip
        return outcome, old.version if outcome == "kept-newer" else newest

    def about_foreign(self, old: Installed, cause: str) -> str:
        name = f"sageattention {old.version or '(without metadata)'} in {old.folder}, which is not this pack's,"
        if not cause:
            return f"{name} works and is kept for --use-sage-attention and other packs; --replace puts this pack's in its place."
        replace = subprocess.list2cmdline([*python_command(), str(PACK / "install.py"), "--replace"])
        return (
            f"{name} IS BROKEN: {cause}\n--use-sage-attention and other packs fail with it; the nodes use this pack's own. "
            f"To put this pack's in its place: {replace}"
        )

    def launcher(self, index: Index, version: str) -> None:
        """Bring the compiled launcher to `version`; without it ctypes launches, so a failure is only told."""
        old, wheel = find(LAUNCHER), index.best(LAUNCHER, version)
        state = self.result["launcher"]
        try:
            if wheel is None:
                if old and old.version != version and version == self.result["pack"] and not self.only_say:
                    self.remove([LAUNCHER])  # of another version it is only warned about
                raise Problem(f"No compiled launcher for {supported_tags()[0]}: ctypes launches the kernels, some µs slower.")
            if not (old and old.version == version and old.intact() and old.is_build(index.local(wheel))):
                self.put(index, wheel, old, prove_launcher)
        except Problem as problem:
            state["why"] = str(problem)
            self.lines.append(str(problem))
        found = find(LAUNCHER)
        state["version"] = found.version if found else None

    def triton(self) -> None:
        """On Windows: name the triton-windows that fits torch, or install it where that was asked for."""
        if os.name != "nt" or not self.result["torch"]:
            self.lines += ["--with-triton: torch brings its Triton on this system."] if self.args.with_triton and os.name != "nt" else []
            return
        table = json.loads((PACK / "wheels" / "triton_windows.json").read_text(encoding="utf-8"))["releases"]
        torch = numbers(self.result["torch"])[:2]
        release = next((r for r in table if numbers(r["torch"]) == torch), None)
        if release is None:
            self.lines.append(f"No triton-windows is known for torch {self.result['torch']}; only the Triton variant needs one.")
            return
        found = find("triton-windows")
        if found and numbers(found.version or "")[:2] == numbers(release["version"])[:2]:
            return
        pin = f"triton-windows=={release['version']}"
        if not self.args.with_triton:
            self.lines.append(f"Only the Triton variant needs {pin}, which fits torch {self.result['torch']}: --with-triton installs it.")
            return
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "requirement.txt"
            file.write_text(" ".join([pin, *(f"--hash=sha256:{digest}" for digest in release["sha256"])]) + "\n", encoding="utf-8")
            command = [*installer("install"), "--no-deps", "--require-hashes", "-r", str(file)]
            if self.only_say:
                self.lines.append(subprocess.list2cmdline([*installer("install"), "--no-deps", pin]))
                return
            child = run(command)
        if child.returncode:
            raise Problem(f"{pin} was not installed: {(child.stderr or child.stdout).strip()[-800:]}")
        self.done.append(pin)

    def remove(self, names: list[str]) -> None:
        command = installer("uninstall")
        child = run([*command, *([] if "--python" in command else ["--yes"]), *names])
        if child.returncode:
            raise Problem(f"{', '.join(names)} could not be removed: {(child.stderr or child.stdout).strip()[-800:]}")

    def uninstall(self) -> str:
        ours = [name for name in (PACKAGE, LAUNCHER) if (found := find(name)) and found.ours]
        if ours and not self.only_say:
            self.remove(ours)
        verb = "Would remove" if self.only_say else "Removed"
        self.lines.append(f"{verb}: {', '.join(ours)}." if ours else "Nothing of this pack is installed.")
        return "uninstalled"

    def work(self) -> int:
        """Do it all. Returns the exit code: 0 unless something that was asked for by a flag failed."""
        asked = self.args.replace or self.args.with_triton or self.args.uninstall
        try:
            for folder in {Path(p) for p in sys.path} if not self.only_say else ():
                if (folder / WORK).is_dir():
                    with exclusive(folder):
                        self.lines.append("An interrupted install was taken back first.")
            if self.args.uninstall:
                outcome = self.uninstall()
            else:
                index = Index(self.args.index or str(PACK / "wheels"), self.args.timeout)
                outcome, version = self.package(index)
                self.launcher(index, version)
                self.triton()
            code = 0
        except (Problem, OSError, subprocess.SubprocessError) as problem:
            self.lines.append(str(problem))
            self.lines.append("The nodes work all the same: they use the package that came with this pack, launching through ctypes.")
            outcome, code = "bundled-only", int(bool(asked))
        if self.done:
            self.lines.insert(0, f"Installed {', '.join(self.done)} for {sys.executable}.")
        self.result |= {"outcome": outcome, "message": "\n".join(self.lines) or f"sageattention {self.result['pack']} is up to date."}
        return code

    def save(self) -> None:
        """Write the result for the node, at once or not at all."""
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.file.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(self.result, indent=1), encoding="utf-8")
            os.replace(fresh, self.file)
        except OSError as error:
            print(f"The result could not be written: {error}.", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Install the bundled sageattention into this Python.")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--print", action="store_true", help="only show the commands that would do it by hand")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--index", help="another index.json: a path, a folder, or an https URL")
    parser.add_argument("--replace", action="store_true", help="put ours in the place of a sageattention from elsewhere, or a newer one")
    parser.add_argument("--with-triton", action="store_true", help="on Windows: install the triton-windows that fits torch")
    parser.add_argument("--uninstall", action="store_true", help="remove what this file installed")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one download (60)")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # paths may hold what a console can't show
    hook = Hook(args)
    code = hook.work()
    if hook.file and not hook.only_say:
        hook.save()
    if args.json:
        print(json.dumps(hook.result))
    else:
        print("\n".join(line if args.print else f"[sageattention] {line}" for line in hook.result["message"].splitlines()))
    return code


if __name__ == "__main__":
    sys.exit(main())
