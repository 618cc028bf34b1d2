"""The command line: what it says where torch, Triton or a GPU are missing, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sageattention import __main__ as cli

ROOT = Path(__file__).resolve().parents[2]
QUICK_CHECK = ["check", "--device", "cpu", "--quick", "--variants", "reference"]


def bare(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a Python without site-packages: no torch, no Triton."""
    command = [sys.executable, "-S", "-m", "sageattention", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_importing_needs_nothing_and_touches_nothing():
    code = "import sageattention, sys; print(sageattention.__version__, 'torch' in sys.modules, 'triton' in sys.modules)"
    for flags in (["-S"], []):
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[1:] == ["False", "False"]


def test_doctor_without_torch_tells_what_is_missing_and_what_would_run():
    done = bare("doctor")
    assert done.returncode == 0, done.stderr
    assert "torch is not installed in" in done.stdout
    assert sys.executable in done.stdout
    assert "would run" in done.stdout


def test_doctor_without_torch_as_json():
    found = json.loads(bare("doctor", "--json").stdout)
    assert found["torch"] is None
    states = {v["name"]: v["status"] for v in found["devices"][0]["variants"]}
    assert states["reference"] == "needs torch"
    assert states["sageattn_qk_int8_pv_fp16_triton"] == "missing"


@pytest.mark.parametrize("command", ["check", "bench", "explain", "card"])
def test_the_others_say_that_they_need_torch(command):
    done = bare(command)
    assert done.returncode == 2
    assert "needs torch" in done.stderr


def test_the_folder_runs_in_a_python_that_looks_nowhere_else(tmp_path):
    """As the embedded Python of ComfyUI's portable build, which has neither the current nor the script's folder on its path."""
    command = [sys.executable, "-I", str(ROOT / "sageattention"), "doctor", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["sageattention"]
    assert found["path"] == str(ROOT / "sageattention") and found["module"] == "sageattention"


def test_doctor_here(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["torch"]["version"]
    assert found["sageattention"]["path"] == str(ROOT / "sageattention")
    assert {v["status"] for v in found["devices"][0]["variants"]} >= {"ready"}
    assert cli.main(["doctor"]) == 0
    assert "Variants on" in capsys.readouterr().out


def test_doctor_names_another_installed_copy(monkeypatch, tmp_path, capsys):
    (tmp_path / "sageattention").mkdir()
    info = tmp_path / "sageattention-2.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sageattention\nVersion: 2.2.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "another sageattention 2.2.0" in out
    assert str(tmp_path / "sageattention") in out


def test_doctor_has_nothing_against_the_copy_that_the_installer_made(monkeypatch, tmp_path, capsys):
    subprocess.run([sys.executable, str(ROOT / "install.py"), "--wheel", str(tmp_path)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def problems():
        assert cli.main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert str(tmp_path / "sageattention") in {copy["path"] for copy in found["sageattention"]["installed"]}
        return [problem for problem in found["problems"] if str(tmp_path) in problem]

    assert not problems()
    with open(tmp_path / "sageattention" / "api.py", "a") as file:
        file.write("# changed\n")
    assert len(problems()) == 1


def test_doctor_names_a_variant_variable_that_names_none(monkeypatch, capsys):
    monkeypatch.setenv("SAGEATTENTION_VARIANT", "fastest")
    assert cli.main(["doctor"]) == 0
    assert "SAGEATTENTION_VARIANT holds 'fastest'" in capsys.readouterr().out


@pytest.mark.parametrize("needed", [False, True])
def test_doctor_asks_for_triton_only_where_nothing_else_runs(needed, monkeypatch):
    from sageattention.cli import doctor
    from sageattention.device import capability

    monkeypatch.setattr(capability, "triton_mode", lambda: "none")
    problems = []
    doctor._triton(needed, problems)
    assert len(problems) == needed and all("Triton is not installed" in p for p in problems)


def test_doctor_survives_a_torch_that_does_not_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('DLL load failed while importing _C')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from sageattention.__main__ import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert "can't be imported (DLL load failed" in done.stdout


def test_check_passes_and_is_parseable(capsys):
    assert cli.main([*QUICK_CHECK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert {r["variant"] for r in found["results"]} == {"reference"}
    quantised = [r for r in found["results"] if r["case"] == "normal"]
    assert quantised and all(r["error"] > 1e-3 for r in quantised)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda out: out * 1.02, "above its bound"),
        (lambda out: out * float("nan"), "not finite"),
    ],
    ids=["2 % too large", "NaN"],
)
def test_check_fails_when_a_variant_is_off(spoil, word, monkeypatch, capsys):
    from sageattention.backends import emulation

    honest = emulation.run

    def spoiled(call):
        out, lse = honest(call)
        return spoil(out), lse

    monkeypatch.setattr(emulation, "run", spoiled)
    assert cli.main(QUICK_CHECK) == 1
    assert word in capsys.readouterr().out


def test_check_fails_when_a_variant_raises(monkeypatch, capsys):
    from sageattention.backends import emulation

    def broken(call):
        raise RuntimeError("launch failed")

    monkeypatch.setattr(emulation, "run", broken)
    assert cli.main(QUICK_CHECK) == 1
    assert "RuntimeError: launch failed" in capsys.readouterr().out


def test_check_of_a_variant_asked_for_by_name_fails_where_it_cannot_run(capsys):
    assert cli.main(["check", "--device", "cpu", "--quick", "--variants", "sageattn_qk_int8_pv_fp8_cuda"]) == 1
    assert "needs a tensor on an NVIDIA GPU" in capsys.readouterr().out


def test_check_of_block_sparse_calls(monkeypatch):
    import torch

    from sageattention.cli import check, sparse_forms
    from sageattention.cli.candidates import variant

    monkeypatch.setattr(check, "SPARSE", check.Shape("sparse", 1, 1, 700, 700, 32))
    given, spoil = sparse_forms.call, {"sol 1": 1.2, "mass 2": float("nan")}

    def call(q, k, v, *, variant, **keywords):
        form = next(name for name, own in sparse_forms.FORMS.items() if own == keywords)
        return given(q, k, v, variant="reference", **keywords) * (1 if variant == "reference" else spoil.get(form, 1))

    monkeypatch.setattr(sparse_forms, "call", call)
    found = list(check.judge_sparse(variant("sageattn_qk_int8_pv_fp8_cuda"), torch.device("cpu")))
    assert {r.case: r.status for r in found} == {f"sparse, {f}": "off" if f in spoil else "ok" for f in sparse_forms.FORMS}
    assert not list(check.judge_sparse(variant("sdpa"), torch.device("cpu")))


def test_bench_has_every_form_of_block_sparse_calls():
    import torch

    from sageattention.cli import sparse_forms, workloads

    q, k, v = workloads.make("video", workloads.Shape("video", 1, 1, 900, 900, 32))
    made = list(sparse_forms.candidates(["reference", "auto"]))
    assert [c.name for c in made[:2]] == ["sol 1 reference", "sol 1.3 reference"] and len(made) == 2 * len(sparse_forms.FORMS)
    assert all(torch.equal(one.call(q, k, v), other.call(q, k, v)) for one, other in zip(made, made[len(sparse_forms.FORMS) :]))


def test_check_tells_a_kernel_that_turns_out_to_be_missing(monkeypatch, capsys):
    from sageattention import KernelMissing
    from sageattention.backends import emulation
    from sageattention.cli import check

    def missing(call):
        raise KernelMissing("reference", "reference.cubin can't be loaded")

    monkeypatch.setattr(emulation, "run", missing)
    real = check.cases
    monkeypatch.setattr(check, "cases", lambda device, quick: iter([next(real(device, quick=quick))]))
    assert cli.main(["check", "--device", "cpu", "--quick"]) == 3
    out = capsys.readouterr().out
    assert "reference.cubin can't be loaded" in out and "NO KERNEL OF THIS PACKAGE WAS CHECKED: none runs on cpu" in out
    assert cli.main(["check", "--device", "cpu", "--quick", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["kernels"] == []
    assert cli.main(["check", "--device", "cpu", "--quick", "--variants", "sdpa"]) == 0  # the user's own choice


def test_bench_on_a_cpu_says_that_there_is_nothing_to_time(capsys):
    assert cli.main(["bench", "--device", "cpu"]) == 0
    assert "no CUDA GPU" in capsys.readouterr().out
    assert cli.main(["bench", "--device", "cpu", "--variants", "sdpa", "--shapes", "flux_512"]) == 0
    assert "--shapes flux_512 is for a GPU, and ignored" in capsys.readouterr().out
    assert cli.main(["bench", "--device", "cpu", "--variants", "reference", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cpu_ms"]["reference"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["bench", "--shapes", "flux_9000"], "flux_9000"),
        (["bench", "--variants", "sageattn3"], "sageattn3"),
        (["bench", "--device", "gpu"], "--device"),
        (["bench", "--sparse", "--masks"], "--sparse"),
        (["bench", "--sparse", "--shapes", "wan_cross"], "as many queries as keys"),
        (["check", "--device", "cuda:99"], "cuda:99"),
        (["check", "--device", "meta"], "--device"),
        (["check", "--variants", "sageattn_qk_int8_pv_fp16_triton:fp8"], "pv_accum_dtype"),
        (["explain", "--shapes", "flux_9000"], "flux_9000"),
        (["explain", "--shapes", "flux_512", "--heads-kv", "7"], "--heads-kv"),
    ],
)
def test_an_unknown_name_is_an_error(arguments, named, capsys):
    assert cli.main(arguments) == 2
    assert named in capsys.readouterr().err


def test_shapes_are_named_or_written_out():
    from sageattention.cli.bench import parse_shape

    assert parse_shape("flux_1024").len_q == 4608
    written = parse_shape("2x10x4096x77x64")
    assert (written.batch, written.heads, written.len_q, written.len_kv, written.head_dim) == (2, 10, 4096, 77, 64)


def test_version():
    from sageattention import __version__

    done = bare("--version")
    assert done.returncode == 0 and done.stdout.split() == ["sageattention", __version__, "in", str(ROOT / "sageattention")]


def test_explain_tells_which_variant_a_call_gets(monkeypatch, capsys):
    from sageattention.device import capability
    from sageattention.device.capability import Capability
    from sageattention.planning import calibration

    assert cli.main(["explain", "--device", "cpu", "--shapes", "flux_1024"]) == 0
    assert capsys.readouterr().out == "flux_1024 (1, 24, 4608, 4608, 128): sdpa on cpu: on cpu tensors quantising gains nothing\n"
    monkeypatch.setattr(capability, "of_device", lambda device, index: Capability("cuda", 89, 128, "none", "RTX 4090"))
    monkeypatch.setattr(calibration, "of_card", lambda card: None)
    assert cli.main(["explain", "--device", "cpu", "--json"]) == 0
    calls = json.loads(capsys.readouterr().out)["calls"]
    assert {shape.split()[0]: one["variant"] for shape, one in calls.items()}["wan_480p"] == "sageattn_qk_int8_pv_int8_cuda"
    asked = ["explain", "--device", "cpu", "--shapes", "2x8x4096x4096x300,2x8x4096x4096x128", "--variant", "sageattn_qk_int8_pv_fp16_cuda"]
    assert cli.main([*asked, "--mask", "causal", "--heads-kv", "2", "--pv-accum-dtype", "fp16", "--dtype", "float16"]) == 1
    out = capsys.readouterr().out
    assert "refused, q: its head_dim is 300" in out and "sageattn_qk_int8_pv_fp16_cuda (fp16) on RTX 4090: asked for by name" in out


def test_a_torch_without_cuda_beside_a_card_is_named(monkeypatch, capsys):
    import torch

    from sageattention import available_variants
    from sageattention.device import capability, libcuda

    capability.torch_without_cuda.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(libcuda, "device_name", lambda index: "RTX 4090")
    told = f"torch {torch.__version__} is a build without CUDA, though there is an NVIDIA card, RTX 4090: install a CUDA build of torch"
    assert all(told in a.reason for a in available_variants("cpu") if a.name.endswith("cuda"))
    assert cli.main(["check", "--device", "cpu", "--quick", "--variants", "sdpa"]) == 0 and told in capsys.readouterr().out
    capability.torch_without_cuda.cache_clear()


def test_a_calibrations_table_fits_a_terminal():
    from sageattention.cli import calibrate
    from sageattention.device.capability import Capability
    from sageattention.planning.calibration import Calibration, Point
    from sageattention.planning.cost import KINDS, TORCH, Form
    from sageattention.variants import VARIANTS, Candidate

    names = [Candidate(name, accum) for name, v in VARIANTS.items() if v.has_kernels for accum in v.accum or [""]]
    ms = {TORCH: 200.0} | {name: 100.0 - number for number, name in enumerate(names)}
    points = [Point(Form(16, 16, 16384, 16384, *kind, 16384), ms) for kind in KINDS]
    lines = calibrate.results(points, Capability("cuda", 89, 128, name="RTX 4090"), Calibration(tuple(points), "")).splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) == 2 + len(KINDS) and all(str(names[-1]) in line for line in lines[2:])


@pytest.mark.gpu
def test_bench_on_a_gpu(capsys):
    assert cli.main(["bench", "--quick", "--shapes", "flux_512,1x2x1000x77x40", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    by_name = {r["candidate"]: r for r in rows if r["shape"] == "flux_512"}
    assert by_name["sdpa_cudnn"]["graph_ratio"] == 1
    timed = [r for r in by_name.values() if not r["skipped"]]
    assert len(timed) > 2
    for row in timed:
        assert row["event_ms"] > 0 and row["tflops"] > 1 and row["error"] < 0.05, row


@pytest.mark.gpu
def test_check_on_a_gpu(capsys):
    assert cli.main(["check"]) == 0, capsys.readouterr().out
