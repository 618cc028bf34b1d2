"""install.py's index and downloads: mirrors that misbehave, and what Windows would be told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import SimpleNamespace

import installing
import pytest
from installing import ROOT, base_python, foreign_wheel, make_pack, mirror, our_wheel, pack, python, write_index

import installer.hook
import installer.index
import installer.interpreter
import installer.wheel

__all__ = ["base_python", "mirror", "pack", "python"]  # fixtures


@pytest.fixture
def mirrored(pack, mirror, tmp_path):
    """A newer package only on a mirror, and an index of it: (pack, options, the wheel's bytes, its path there, the index)."""
    wheel = our_wheel(tmp_path, "3.0.1")
    path = f"/{wheel.name}"
    index = write_index(tmp_path / "index", wheel, urls=[mirror.url + path])
    mirror.answers[path] = wheel.read_bytes()
    return SimpleNamespace(pack=pack, options=("--index", str(index)), data=wheel.read_bytes(), path=path, index=index)


def _refused(python, pack, told, *parts):
    assert (told["outcome"], told["code"]) == ("bundled-only", 0), told
    assert all(part in told["message"] for part in parts), told["message"]
    assert "Traceback" not in told["errors"]
    assert python.version() is None
    assert not list(python.site.glob("*sageattention*"))


def test_a_mirror_is_asked_only_for_what_is_not_beside_the_index(python, mirrored, mirror):
    assert python.install(mirrored.pack, *mirrored.options)["outcome"] == "installed"
    assert mirror.asked == [mirrored.path]
    assert python.install(mirrored.pack, *mirrored.options)["outcome"] == "current"
    assert mirror.asked == [mirrored.path]


def test_the_wheels_folder_needs_no_network(python, pack, mirror):
    index = pack / "wheels" / "index.json"
    data = json.loads(index.read_text())
    for wheel in data["wheels"]:
        wheel["urls"] = [f"{mirror.url}/{wheel['file']}"]
    index.write_text(json.dumps(data))
    assert python.install(pack)["outcome"] == "installed"
    assert mirror.asked == []


def test_an_address_that_is_none(python, mirrored):
    index = mirrored.index
    data = json.loads(index.read_text())
    data["wheels"][0]["urls"] = ["https://[half"]
    index.write_text(json.dumps(data))
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "https://[half")


def test_an_index_by_url(python, pack, mirror, tmp_path):
    wheel = our_wheel(tmp_path, "3.1.0")
    mirror.answers["/v3/index.json"] = write_index(tmp_path, wheel).read_bytes()
    mirror.answers[f"/v3/{wheel.name}"] = wheel.read_bytes()
    assert python.install(pack, "--index", f"{mirror.url}/v3/index.json")["outcome"] == "installed"
    assert python.version() == "3.1.0"


def test_wrong_bytes(python, mirrored, mirror):
    mirror.answers[mirrored.path] = mirrored.data[:-1] + b"x"
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "sha256 differ")


def test_a_wrong_file_beside_the_index_gives_way_to_the_mirror(python, mirrored):
    (mirrored.index.parent / mirrored.path[1:]).write_bytes(mirrored.data[:-1] + b"x")
    assert python.install(mirrored.pack, *mirrored.options)["outcome"] == "installed"


def test_too_many_bytes(python, mirrored, mirror):
    mirror.answers[mirrored.path] = mirrored.data + bytes(1 << 20)
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "size or sha256")


def _truncated(data):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])

    return answer


def test_a_truncated_body(python, mirrored, mirror):
    mirror.answers[mirrored.path] = _truncated(mirrored.data)
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), mirrored.path)


def test_not_found(python, mirrored, mirror):
    mirror.answers.clear()
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "404")


def test_nobody_listens(python, mirrored, mirror):
    mirror.close()
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "refused")


@pytest.mark.parametrize(
    ("host", "words"),
    [("http://127.0.0.2:9/", "only https"), ("https://example.invalid/", "another host"), ("file:///etc/passwd?", "not allowed")],
)
def test_a_redirect_to_another_host(python, mirrored, mirror, host, words):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", host + mirrored.path)
        handler.end_headers()

    mirror.answers[mirrored.path] = answer
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), words)


def test_a_redirect_on_the_same_host(python, mirrored, mirror):
    def answer(handler):
        handler.send_response(302)
        handler.send_header("Location", "/elsewhere.whl")
        handler.end_headers()

    mirror.answers |= {mirrored.path: answer, "/elsewhere.whl": mirrored.data}
    assert python.install(mirrored.pack, *mirrored.options)["outcome"] == "installed"


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "a byte at a time"])
def test_a_stall_ends(python, mirrored, mirror, drip):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(mirrored.data)))
        handler.end_headers()
        for byte in mirrored.data[:40]:
            time.sleep(0.25)
            if drip:
                try:
                    handler.wfile.write(bytes([byte]))
                except OSError:  # the client has gone, as it should
                    return

    mirror.answers[mirrored.path] = answer
    start = time.monotonic()
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options, "--timeout", "1"), mirrored.path)
    assert time.monotonic() - start < 8 * installing.TIMES


@pytest.mark.parametrize(
    "url", ["http://example.invalid/x.whl", "ftp://127.0.0.1/x.whl", "file:///tmp/x.whl", "http://127.0.0.1.example/x"]
)
def test_only_https_but_on_loopback(python, mirrored, url):
    index = mirrored.index
    data = json.loads(index.read_text())
    data["wheels"][0]["urls"] = [url]
    index.write_text(json.dumps(data))
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "only https")


@pytest.mark.parametrize(
    "text", ["<html>busy</html>", "[]", '{"wheels": 3}', '{"wheels": [{}]}', '{"wheels": ["x"]}', ""],
    ids=["html", "list", "number", "no_fields", "text", "empty"],
)  # fmt: skip
def test_an_index_that_is_none(python, pack, mirror, text):
    mirror.answers["/index.json"] = text.encode()
    _refused(python, pack, python.install(pack, "--index", f"{mirror.url}/index.json"), "is not one")


def test_an_index_that_is_not_there(python, pack, tmp_path):
    _refused(python, pack, python.install(pack, "--index", str(tmp_path / "none")), "can't be read")


@pytest.mark.parametrize(
    "file",
    ["../../evil-1.0.0-py3-none-any.whl", "/tmp/sageattention-3.0.0-py3-none-any.whl", "sageattention-3.0.0-py3-none-any.whl/../x",
     "evil-3.0.0-py3-none-any.whl", "sageattention-3.0.0.tar.gz", "..\\sageattention-3.0.0-py3-none-any.whl"],
)  # fmt: skip
def test_a_name_that_is_none(python, mirrored, file):
    index = mirrored.index
    data = json.loads(index.read_text())
    data["wheels"][0]["file"] = file
    index.write_text(json.dumps(data))
    _refused(python, mirrored.pack, python.install(mirrored.pack, *mirrored.options), "is no wheel of")


def test_a_wheel_for_another_platform(python, pack, tmp_path):
    """Its tags are read from its name, whatever the index says they are."""
    wheel = our_wheel(tmp_path, "3.0.1")
    other = wheel.rename(tmp_path / "sageattention-3.0.1-cp39-cp39-macosx_11_0_arm64.whl")
    write_index(tmp_path, other, tags=["py3-none-any"])
    done = python.install(pack, "--index", str(tmp_path))
    assert done["outcome"] == "installed" and done["message"].startswith("Installed sageattention 3.0.0 for")  # the pack's own


def test_an_index_without_a_package_brings_launchers_for_the_packs_own(python, pack, tmp_path):
    launcher = installing.launcher_wheel(tmp_path, code="mine = True\n")
    done = python.install(pack, "--index", str(write_index(tmp_path, launcher)))
    assert (done["outcome"], done["launcher"]["version"]) == ("installed", "3.0.0")
    assert "mine" in (python.site / "sageattention_launcher.py").read_text()


def test_tag_order(tmp_path, monkeypatch):
    monkeypatch.setattr(
        installer.index, "supported_tags", lambda: ["cp312-cp312-manylinux_2_35_x86_64", "cp312-cp312-manylinux_2_17_x86_64"]
    )
    tags = ["cp312-cp312-manylinux_2_17_x86_64", "cp312-cp312-manylinux_2_35_x86_64", "cp312-cp312-manylinux_2_39_x86_64"]
    wheels = [installing.launcher_wheel(tmp_path, tag=tag) for tag in tags]
    index = installer.index.Index(str(write_index(tmp_path, *wheels)), 5)
    assert index.best("sageattention-launcher", "3.0.0").file == wheels[1].name
    assert index.best("sageattention-launcher", "3.0.1") is None
    assert index.best("sageattention") is None


def test_tags_of_this_python_are_those_of_packaging():
    tags = pytest.importorskip("packaging.tags")
    theirs = [str(tag) for tag in tags.sys_tags()]
    ours = installer.interpreter.supported_tags()
    assert [tag for tag in theirs if tag in ours] == ours


class FakeOs:
    """The module os of a Windows, as far as install.py looks."""

    name = "nt"

    def __getattr__(self, name):
        if name in ("confstr", "getuid"):
            raise AttributeError(name)
        return getattr(os, name)


@pytest.fixture
def windows(monkeypatch):
    """install.py on a portable ComfyUI of Windows; the commands that it runs are recorded, not run."""
    commands = []

    def run(command, timeout=0):
        requirement = [Path(command[command.index("-r") + 1]).read_text(encoding="utf-8")] if "-r" in command else []
        commands.append((command, *requirement))
        return subprocess.CompletedProcess(command, 0, "", "")

    for module in (installer.hook, installer.interpreter):
        monkeypatch.setattr(module, "os", FakeOs())
    monkeypatch.setattr(installer.hook, "run", run)
    monkeypatch.setattr(installer.hook, "torch_version", lambda: "2.9.1+cu130")
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "win-amd64")
    monkeypatch.setattr(sys, "executable", r"C:\Ünser AI\ComfyUI_windows_portable\python_embeded\python.exe")
    return commands


def test_windows_tags(windows):
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert installer.interpreter.supported_tags() == [f"{version}-{version}-win_amd64", "py3-none-any"]


def test_windows_picks_the_windows_launcher(windows, tmp_path):
    version = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    linux = installing.launcher_wheel(tmp_path, tag=f"{version}-{version}-manylinux_2_17_x86_64")
    win = installing.launcher_wheel(tmp_path, tag=f"{version}-{version}-win_amd64")
    index = installer.index.Index(str(write_index(tmp_path, linux, win)), 5)
    assert index.best("sageattention-launcher", "3.0.0").file == win.name


def test_windows_command_lines(windows, tmp_path, monkeypatch):
    pack = make_pack(tmp_path / "custom_nodes" / "pack", launcher=False)
    monkeypatch.setattr(installer.hook, "PACK", pack)
    monkeypatch.setattr(installer.hook, "Bundle", lambda: installer.wheel.Bundle(pack))
    monkeypatch.setattr(installer.hook, "find", lambda name: None)
    hook = installer.hook.Hook(
        SimpleNamespace(print=True, dry_run=False, replace=False, with_triton=False, uninstall=False, index=None, timeout=5)
    )
    assert hook.work() == 0
    exe = r'"C:\Ünser AI\ComfyUI_windows_portable\python_embeded\python.exe" -s -m pip'
    assert hook.lines[0].startswith(exe.removesuffix("-m pip")) and "--wheel" in hook.lines[0]
    assert hook.lines[1].startswith(exe) and hook.lines[1].endswith("sageattention-3.0.0-py3-none-any.whl")
    assert not windows  # --print only shows


@pytest.mark.parametrize(
    ("torch", "release"),
    [
        ("2.9.1+cu130", "3.5.1.post24"),
        ("2.10.0+cu128", "3.6.0.post26"),
        ("2.5.1", "3.1.0.post17"),
        ("2.14.1+cu130", "3.8.0.post29"),
        ("2.4.0", None),
    ],
)
def test_windows_names_or_installs_the_triton_that_fits(windows, monkeypatch, torch, release):
    monkeypatch.setattr(installer.hook, "torch_version", lambda: torch)
    args = SimpleNamespace(print=False, dry_run=False, with_triton=False)
    hook = installer.hook.Hook(args)
    hook.triton()
    assert not windows
    if release is None:
        assert "No triton-windows is known for torch 2.4.0" in hook.lines[0]
        args.with_triton = True
        with pytest.raises(installer.Problem, match=r"No triton-windows is known for torch 2\.4\.0"):  # asked for, and not to be had
            hook.triton()
        assert not windows
        return
    assert f"triton-windows=={release}" in hook.lines[0] and "--with-triton" in hook.lines[0]
    args.with_triton = True
    hook.triton()
    ((command, requirement),) = windows
    assert command[1:4] == ["-s", "-m", "pip"] and "--no-deps" in command and "--require-hashes" in command
    assert requirement.startswith(f"triton-windows=={release} --hash=sha256:")


@pytest.mark.parametrize("asked", [False, True])
def test_windows_a_triton_that_is_not_to_be_had_fails_where_it_was_asked_for(windows, tmp_path, monkeypatch, asked):
    pack = make_pack(tmp_path / "custom_nodes" / "pack", launcher=False)
    monkeypatch.setattr(installer.hook, "PACK", pack)
    monkeypatch.setattr(installer.hook, "Bundle", lambda: installer.wheel.Bundle(pack))
    monkeypatch.setattr(installer.hook, "find", lambda name: None)
    monkeypatch.setattr(installer.hook, "torch_version", lambda: "99.0.0")
    options = SimpleNamespace(print=False, dry_run=True, replace=False, with_triton=asked, uninstall=False, index=None, timeout=5)
    hook = installer.hook.Hook(options)
    assert hook.work() == int(asked)
    assert hook.result["outcome"] == "current" and "No triton-windows is known for torch 99.0.0" in hook.result["message"]


@pytest.mark.parametrize("text", [b"", bytes(60), b"{}", b'{"releases": [3]}'])
def test_windows_a_damaged_table_of_tritons_is_told_of(windows, tmp_path, monkeypatch, text):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "triton_windows.json").write_bytes(text)
    monkeypatch.setattr(installer.hook, "PACK", tmp_path)
    hook = installer.hook.Hook(SimpleNamespace(print=False, dry_run=False, with_triton=False))
    with pytest.raises(installer.Problem, match="install the node pack again"):
        hook.triton()


def test_windows_leaves_a_triton_that_fits(windows, monkeypatch):
    monkeypatch.setattr(installer.hook, "find", lambda name: SimpleNamespace(version="3.5.0.post21"))
    hook = installer.hook.Hook(SimpleNamespace(print=False, dry_run=False, with_triton=True))
    hook.triton()
    assert not windows and not hook.lines


def test_the_triton_table():
    releases = json.loads((ROOT / "wheels" / "triton_windows.json").read_text())["releases"]
    order = [tuple(map(int, release["torch"].split("."))) for release in releases]
    assert order == sorted(set(order)) and order[0] == (2, 5)
    for release in releases:
        assert all(len(bytes.fromhex(digest)) == 32 for digest in release["sha256"]) and len(release["sha256"]) >= 4


@pytest.mark.parametrize("allowed", [False, True])
def test_a_python_of_the_system_is_left_alone(pack, tmp_path, monkeypatch, allowed):
    """PEP 668; the variable is the one by which a container says that it has no other Python."""
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    site = tmp_path / "site"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path), "purelib": str(site)}.get)
    monkeypatch.setattr(installer.hook, "exchange", lambda wheel, name, old, folder, prove: site.mkdir())
    monkeypatch.setenv("PIP_BREAK_SYSTEM_PACKAGES", "1" if allowed else "")
    hook = installer.hook.Hook(SimpleNamespace(print=False, dry_run=False))
    wheel = installer.wheel.Bundle(pack)
    if allowed:
        assert hook.put(wheel, None, None) and site.exists()
    else:
        with pytest.raises(installer.Problem, match="belongs to the system"):
            hook.put(wheel, None, None)
        assert not site.exists()


def test_an_open_library_undoes_the_exchange(python, pack, tmp_path, monkeypatch):
    """Windows refuses to move a folder whose DLL a running ComfyUI has loaded."""
    python.put(foreign_wheel(tmp_path))
    script = (
        "import os, runpy, sys\nreal = os.rename\n"
        "def rename(a, b):\n"
        "    if str(b).endswith('.dist-info') and 'old-' in str(b): raise PermissionError(13, 'Access is denied', str(a))\n"
        "    real(a, b)\n"
        "os.rename = rename\nsys.argv = ['install.py', '--replace', '--json']\nsys.path[0] = os.getcwd()\n"
        "runpy.run_path('install.py', run_name='__main__')\n"
    )
    done = subprocess.run([python.exe, "-c", script], cwd=pack, capture_output=True, text=True, encoding="utf-8")
    told = json.loads(done.stdout)
    assert told["outcome"] == "bundled-only" and "Close ComfyUI and run this again" in told["message"] and done.returncode == 1
    assert python.version() == "foreign" and (python.site / "sageattention" / "core.py").exists()
