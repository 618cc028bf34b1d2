"""`check`: is every variant that this machine can run right? Each against the fp64 oracle, on every input kind and call form."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..device import capability
from ..errors import KernelMissing, Unsupported
from ..variants import VARIANTS
from . import sparse_forms, workloads
from .candidates import Attention, chosen_device, ready, variant
from .mask_forms import MASK_FORMS, padding, text_then_image
from .text import table
from .workloads import KINDS, Kind, Shape

if TYPE_CHECKING:
    import torch

SMALL = Shape("small", 1, 2, 70, 333, 64)  # the call forms and head dimensions; odd lengths
# On a CPU a few rows of two heads tell as much about the numerics, in seconds; key counts stay, for the sums are along them.
CPU = replace(workloads.ACCURACY, heads=2, len_q=48)
SPARSE = Shape("sparse", 1, 8, 3001, 3001, 128)
# Relative L2 error against the algorithm in fp64, by the type of P and V. A block whose score is within rounding of the threshold may be
# exact for the one and not for the other.
SPARSE_BOUNDS = {"fp16": 0.04, "int8": 0.06, "fp8": 0.08}
# Rounding moves a logit by about 0.4 % of its magnitude, and the LSE follows its row's largest ones. The sum is one of P as rounded, which
# fits P·V: e4m3 is off by up to a sixteenth, which shows where a row sees a key or two.
LSE_BOUNDS = {"fp16": 0.02, "int8": 0.02, "fp8": 0.08}
VIDEO_TOKENS = (15360, 104050)
HEAD_DIMS = (40, 64, 80, 128, 160, 256)


@dataclass(frozen=True)
class Result:
    """One comparison. `status`: "ok", "off", "unsupported" (the call is refused, with a reason), "missing" (its kernel can't be had
    after all) or "failed" (an exception)."""

    variant: str
    case: str
    status: str
    error: float | None = None  # relative L2 against the oracle
    bound: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class VideoError:
    """What a variant makes of the kind `video`: relative L2 errors against dense attention in fp64, dense and block-sparse."""

    variant: str
    tokens: int
    dense: float
    sparse: float


@dataclass(frozen=True)
class Case:
    """One call: its tensors, keywords of `sageattn`, and the kind whose bounds hold for it."""

    name: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kind: Kind
    keywords: dict[str, Any]
    exact: torch.Tensor
    exact_lse: torch.Tensor

    @property
    def lse(self) -> bool:
        """Whether the LSE is asked for too; the large cases leave it out, for it is a second call."""
        return self.exact_lse.numel() * self.k.shape[2] <= 1 << 16


def cases(device: torch.device, *, quick: bool = False, seed: int = 0) -> Iterator[Case]:
    """Every input kind at its own size, then (unless `quick`) head dimensions, masks, GQA, layout, scale and LSE on small ones."""
    shape = CPU if device.type == "cpu" else workloads.ACCURACY
    for kind in KINDS.values():
        # Above 3,001 keys the rows only add time: the kinds that need more keys get fewer rows.
        sized = kind.sized(shape)
        sized = replace(sized, len_q=min(sized.len_q, 512)) if kind.len_kv else sized
        yield _case(kind.name, kind, workloads.make(kind.name, sized, device=device, seed=seed), {})
    if quick:
        return
    normal = KINDS["normal"]
    # The largest of 256 rotated channels is 5 % above that of 128, and so are the steps of the INT8 codes.
    wide = replace(normal, bounds={pv: 1.05 * bound for pv, bound in normal.bounds.items()})
    for head_dim in HEAD_DIMS:
        yield _case(
            f"head_dim {head_dim}",
            wide if head_dim == 256 else normal,
            workloads.make("normal", replace(SMALL, head_dim=head_dim), device=device),
            {},
        )
    yield from _forms(device, normal)


def _forms(device: torch.device, normal: Kind) -> Iterator[Case]:
    import torch

    q, k, v = workloads.make("normal", SMALL, device=device)
    rows, keys = SMALL.len_q, SMALL.len_kv
    generator = torch.Generator(device).manual_seed(1)
    keep = torch.rand(SMALL.batch, 1, rows, keys, generator=generator, dtype=torch.float32, device=device) < 0.7
    bias = torch.randn(1, SMALL.heads, rows, keys, generator=generator, dtype=torch.float32, device=device)
    masked_row = keep.clone()
    masked_row[..., 3, :] = False  # nothing to attend to: zeros
    smallest = torch.zeros(rows, keys, dtype=torch.float32, device=device)
    smallest[5] = torch.finfo(torch.float32).min  # a finite bias on a whole row: the plain average
    yield _case("causal", normal, (q, k, v), {"is_causal": True})
    yield _case("bool mask", normal, (q, k, v), {"attn_mask": keep})
    yield _case("fully masked row", normal, (q, k, v), {"attn_mask": masked_row})
    yield _case("additive mask", normal, (q, k, v), {"attn_mask": bias})
    yield _case("mask of finfo.min", normal, (q, k, v), {"attn_mask": smallest})
    yield from _masked_keys(device, normal)
    yield _case("scale", normal, (q, k, v), {"sm_scale": 0.05})
    yield _case("GQA", normal, (q, k[:, :1], v[:, :1]), {})
    yield _case("NHD strides", normal, tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), {})
    yield _case("one key", normal, (q, k[:, :, :1], v[:, :, :1]), {})
    yield _case("fp16", normal, tuple(t.half() for t in (q, k, v)), {})
    yield _case("fp32", normal, tuple(t.float() for t in (q, k, v)), {})


def _masked_keys(device: torch.device, normal: Kind) -> Iterator[Case]:
    """Keys that no query sees hold what would spoil the scales of all others."""
    import torch

    square = replace(SMALL, len_q=SMALL.len_kv)
    for name, shape, keywords in (
        ("padding, bool", SMALL, {"attn_mask": padding(SMALL, device)}),
        ("padding, finfo.min", SMALL, MASK_FORMS["key finfo.min"].keywords(SMALL, torch.bfloat16, device)),
        ("padding, causal", square, {"attn_mask": padding(square, device), "is_causal": True}),
    ):
        q, k, v = workloads.make("normal", shape, device=device)
        hidden = ~padding(shape, device)[0, 0, 0]
        k[:, :, hidden], v[:, :, hidden] = 50.0, 50.0  # all alike and large
        yield _case(name, normal, (q, k, v), keywords)
    yield _case("text, then image", normal, workloads.make("normal", square, device=device), {"attn_mask": text_then_image(square, device)})


def _case(name: str, kind: Kind, qkv: tuple[torch.Tensor, ...], keywords: dict[str, Any]) -> Case:
    from ..numerics.reference import oracle

    q, k, v = qkv
    exact, lse = oracle(q, k, v, **keywords)
    return Case(name, q, k, v, kind, keywords, exact, lse)


def judge(candidate: Attention, case: Case) -> Result:
    """Run one case with one candidate and hold the result against the oracle."""
    import torch

    bound = case.kind.bounds[candidate.scheme.pv if candidate.scheme else "fp16"]
    q, k, v = case.q, case.k, case.v
    if q.dtype == torch.bfloat16 and _interpreted(candidate):
        q, k, v = q.float(), k.float(), v.float()  # Triton's interpreter cuts bf16 off where a GPU rounds: not the kernel's error
    try:
        out = candidate.call(q, k, v, **case.keywords)
        lse = candidate.call(q, k, v, return_lse=True, **case.keywords)[1] if case.lse else None
    except Unsupported as refused:
        return Result(candidate.name, case.name, "unsupported", bound=bound, detail=str(refused))
    except KernelMissing as missing:
        return Result(candidate.name, case.name, "missing", bound=bound, detail=str(missing))
    except Exception as thrown:  # whatever a kernel or its compiler throws is this check's finding, and makes it fail
        return Result(candidate.name, case.name, "failed", bound=bound, detail=f"{type(thrown).__name__}: {thrown}")
    if not bool(out.isfinite().all()):
        return Result(candidate.name, case.name, "off", None, bound, f"{int((~out.isfinite()).sum())} values are not finite")
    error = workloads.relative_l2(out, case.exact)
    detail = _deviations(out, lse, case, candidate.scheme.pv if candidate.scheme else "fp16")
    if error > bound:
        detail.insert(0, "error above its bound")
    return Result(candidate.name, case.name, "off" if detail else "ok", error, bound, "; ".join(detail))


def _interpreted(candidate: Attention) -> bool:
    return candidate.variant is not None and candidate.variant.backend == "triton" and capability.triton_mode() == "interpret"


def _deviations(out: torch.Tensor, lse: torch.Tensor | None, case: Case, pv: str) -> list[str]:
    """What is wrong beyond the relative error: coherent sums, empty rows, the log-sum-exp. `pv`: P's type, as of `Scheme`."""
    found = []
    if case.kind.gain is not None:
        gain = workloads.gain(out, case.exact)
        if abs(gain - 1) > case.kind.gain:
            found.append(f"gain {gain:.4f}, must be within {case.kind.gain} of 1")
    empty = case.exact_lse == float("-inf")
    if bool(out[empty].any()):
        found.append("a fully masked row is not zero")
    if lse is None:
        return found
    if bool((lse[empty] != float("-inf")).any()):
        found.append("a fully masked row's LSE is not -inf")
    ordinary = case.exact_lse.abs() < 1e30  # above it, a finite mask value is cut off so that it stays finite
    off = (lse.double() - case.exact_lse)[ordinary].abs() / case.exact_lse[ordinary].abs().clamp_min(1)
    if off.numel() and not float(off.max()) <= LSE_BOUNDS[pv]:
        found.append(f"LSE off by {float(off.max()):.3g} (relative, or nats under 1)")
    return found


def judge_sparse(candidate: Attention, device: torch.device) -> Iterator[Result]:
    """Block-sparse calls of a variant against the algorithm in fp64."""
    if candidate.variant is None or not candidate.variant.sparse_kernels or not candidate.scheme:
        return
    q, k, v = workloads.make("video", SPARSE, device=device)
    bound = SPARSE_BOUNDS[candidate.scheme.pv]
    for form, keywords in sparse_forms.FORMS.items():
        name = f"sparse, {form}"
        try:
            out = sparse_forms.call(q, k, v, variant=candidate.variant.name, **keywords)
        except (Unsupported, KernelMissing) as refused:
            status = "missing" if isinstance(refused, KernelMissing) else "unsupported"
            yield Result(candidate.name, name, status, bound=bound, detail=str(refused))
            continue
        exact = sparse_forms.call(q, k, v, variant="reference", **keywords)
        error = workloads.relative_l2(out, exact)
        yield Result(
            candidate.name, name, "ok" if error <= bound else "off", error, bound, "" if error <= bound else "error above its bound"
        )


def video_errors(candidates: list[Attention], device: torch.device) -> Iterator[VideoError]:
    """Each variant's that has a block-sparse form, on 64 rows of eight heads."""
    from ..numerics.reference import oracle

    for tokens in VIDEO_TOKENS:
        q, k, v = workloads.make("video", Shape("video", 1, 8, tokens, tokens, 128), device=device)
        rows = slice(None, None, tokens // 64)
        exact, _ = oracle(q[:, :, rows], k, v)
        for candidate in candidates:
            if candidate.variant is None or not candidate.variant.sparse_kernels:
                continue
            sparse = sparse_forms.call(q, k, v, variant=candidate.variant.name, **sparse_forms.FORMS["mass 2"])
            dense, chosen = (workloads.relative_l2(out[:, :, rows], exact) for out in (candidate.call(q, k, v), sparse))
            yield VideoError(candidate.name, tokens, dense, chosen)


def run(device: torch.device, names: list[str] | None = None, *, quick: bool = False) -> tuple[list[Result], list[tuple[str, str]]]:
    """Judge the ready variants (or those named) on every case: the results, and (name, reason) of the variants left out."""
    chosen, refused = ([variant(name) for name in names], []) if names else ready(device, accumulators=True)
    results = [judge(candidate, case) for case in cases(device, quick=quick) for candidate in chosen]
    if device.type == "cuda":
        results += [result for candidate in chosen for result in judge_sparse(candidate, device)]
    results.sort(key=lambda r: [c.name for c in chosen].index(r.variant))
    return results, refused


def findings(device: torch.device, names: list[str] | None = None, *, quick: bool = False) -> dict[str, Any]:
    """`run` as plain data. `ok`: nothing is off or failed. A variant asked for by name has to be there; of the others, what is missing is
    told, and is not wrong. `kernels`: the variants with kernels that gave a result."""
    results, refused = run(device, names, quick=quick)
    bad = [r for r in results if r.status in ("off", "failed") or (names and r.status in ("missing", "unsupported"))]
    judged = {r.variant.partition(":")[0] for r in results if r.status in ("ok", "off", "failed")}
    kernels = sorted(name for name in judged if VARIANTS[name].has_kernels)
    videos = list(video_errors([variant(name) for name in kernels], device)) if device.type == "cuda" and not quick and not bad else []
    return {
        "device": str(device),
        "ok": not bad,
        "right": sum(r.status == "ok" for r in results),
        "wrong": len(bad),
        "kernels": kernels,
        "results": [asdict(r) for r in results],
        "video": [asdict(e) for e in videos],
        "not_run": dict(refused),
    }


def exit_code(found: dict[str, Any], names: list[str] | None = None) -> int:
    """1 where a variant is off or fails, 3 where no kernel of this package was checked though none was left out by name, 0 otherwise."""
    return 1 if not found["ok"] else 0 if found["kernels"] or names else 3


def verdict(found: dict[str, Any]) -> str:
    """The count, and a warning where no kernel was there to check."""
    text = f"{found['right']} of {len(found['results'])} are right" + (f", {found['wrong']} are not." if found["wrong"] else ".")
    if not found["kernels"]:
        text += f"\n\nNO KERNEL OF THIS PACKAGE WAS CHECKED: none runs on {found['device']}. {capability.torch_without_cuda()}".rstrip()
    return text


def main(args: argparse.Namespace) -> int:
    """The command; `exit_code` says what it returns."""
    found = findings(chosen_device(args.device), args.variants, quick=args.quick)
    if args.json:
        print(json.dumps(found, indent=2))
        return exit_code(found, args.variants)
    print(f"Relative L2 error against fp64, bf16 inputs, on {found['device']}.")
    rows = [(r["variant"], r["case"], r["status"], _number(r["error"]), _number(r["bound"]), r["detail"]) for r in found["results"]]
    print(table(("variant", "case", "status", "error", "bound", ""), rows, numeric=(3, 4)))
    if found["video"]:
        print("\nInputs of kind video against dense attention in fp64; block-sparse by `mass` 2 in 4x4x4 cubes.")
        errors = [(e["variant"], f"{e['tokens']:,}", _number(e["dense"]), _number(e["sparse"])) for e in found["video"]]
        print(table(("variant", "tokens", "dense", "block-sparse"), errors, numeric=(1, 2, 3)))
    for name, reason in found["not_run"].items():
        print(f"not run: {name} - {reason}")
    print(verdict(found))
    return exit_code(found, args.variants)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
