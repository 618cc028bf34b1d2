"""The adapter honours ComfyUI's whole attention call, in both generations of the core, and never ends a run."""

from __future__ import annotations

import copy
import importlib
import itertools
import logging
import pickle
import sys
import threading
import weakref
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Container, Model, NewCore, OldCore, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
adapter, record, sampling = PACK.nodes.adapter, PACK.nodes.record, PACK.nodes.sampling

BATCH, HEADS, LEN_Q, LEN_K, DIM = 2, 4, 24, 17, 40
TOKENS_H3 = 30
BOUND = 0.02  # of reference's relative L2 error on normal inputs; 0.006 is typical
CORES = [OldCore, NewCore]
TRITON = "sageattn_qk_int8_pv_fp16_triton"


def part(name: str) -> ModuleType:
    """A module of the pack's own copy of the package."""
    return importlib.import_module(f"{PACK.sageattention.__name__}.{name}")


CARD = part("device.capability").Capability("cuda", 89, 1, "native", "RTX 4090")


def tensors(heads_kv: int = HEADS, hnd: bool = False, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(BATCH, heads, length, DIM) for heads, length in ((HEADS, LEN_Q), (heads_kv, LEN_K), (heads_kv, LEN_K))]
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return made if hnd else [t.transpose(1, 2).flatten(2) for t in made]


def call(override, core, *args, **kwargs) -> torch.Tensor:
    return core.attention(*args, transformer_options={KEY: override}, **kwargs)


def assert_quantised(out: torch.Tensor, exact: torch.Tensor) -> None:
    """Right within the bound, and not to the last bit: so our attention, not PyTorch's, has run."""
    assert out.shape == exact.shape and out.dtype == exact.dtype
    error = float((out.float() - exact.float()).norm() / exact.float().norm())
    assert 1e-5 < error < BOUND


def reasons(override) -> list[str]:
    return list(override.record.fallbacks)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize(("hnd_in", "hnd_out"), list(itertools.product([False, True], repeat=2)))
def test_layouts_and_heads(core, by_keyword, hnd_in, hnd_out):
    q, k, v = tensors(hnd=hnd_in)
    override, core = adapter.SageOverride("reference"), core()
    heads = {"heads": HEADS} if by_keyword else {}
    flags = {"skip_reshape": hnd_in, "skip_output_reshape": hnd_out}
    out = call(override, core, q, k, v, *([] if by_keyword else [HEADS]), **heads, **flags)
    assert_quantised(out, sdpa(q, k, v, HEADS, **flags))
    assert not core.own_calls
    assert override.record.as_dict() == {"ran": {"reference": 1}, "kept": {}, "fallbacks": {}}


def test_everything_by_position():
    q, k, v = tensors(hnd=True)
    mask = torch.ones(LEN_Q, LEN_K, dtype=torch.bool).tril(4)
    args = (q, k, v, HEADS, mask, torch.float32, True, True)
    assert_quantised(call(adapter.SageOverride("reference"), OldCore(), *args), sdpa(*args))


MASK_SHAPES = [(LEN_Q, LEN_K), (1, LEN_K), (BATCH, LEN_Q, LEN_K), (1, LEN_Q, LEN_K), (BATCH, 1, LEN_K), (1, 1, LEN_Q, LEN_K),
               (BATCH, 1, 1, LEN_K), (BATCH, HEADS, LEN_Q, LEN_K)]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "float32"])
@pytest.mark.parametrize("hnd", [False, True])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_masks(shape, hnd, kind):
    q, k, v = tensors(hnd=hnd)
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if kind == "bool":
        mask = mask > -0.5
        mask[..., 0] = True  # no query without a key: SDPA would give NaN there
    override = adapter.SageOverride("reference")
    out = call(override, NewCore(), q, k, v, HEADS, mask, skip_reshape=hnd)
    assert_quantised(out, sdpa(q, k, v, HEADS, mask, skip_reshape=hnd))
    unmasked = sdpa(q, k, v, HEADS, skip_reshape=hnd)
    assert float((out - unmasked).norm() / unmasked.norm()) > 0.1


def test_mask_of_a_batch_is_not_taken_for_one_of_heads():
    q, k, v = (t.repeat(2, 1, 1) for t in tensors())  # batch = heads = 4, where a wrong broadcast would go unnoticed
    mask = torch.rand(4, LEN_Q, LEN_K, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[..., 0] = True
    assert_quantised(call(adapter.SageOverride("reference"), OldCore(), q, k, v, HEADS, mask), sdpa(q, k, v, HEADS, mask))


@pytest.mark.parametrize("hnd", [False, True])
def test_scale(hnd):
    q, k, v = tensors(hnd=hnd)
    out = call(adapter.SageOverride("reference"), NewCore(), q, k, v, HEADS, skip_reshape=hnd, scale=0.5)
    assert_quantised(out, sdpa(q, k, v, HEADS, skip_reshape=hnd, scale=0.5))
    plain = sdpa(q, k, v, HEADS, skip_reshape=hnd)
    assert float((out - plain).norm() / plain.norm()) > 0.1


@pytest.mark.parametrize("heads_kv", [1, 2])
@pytest.mark.parametrize("hnd", [False, True])
def test_grouped_queries(hnd, heads_kv):
    q, k, v = tensors(heads_kv, hnd)
    override = adapter.SageOverride("reference")
    out = call(override, NewCore(), q, k, v, HEADS, skip_reshape=hnd, enable_gqa=True)
    assert_quantised(out, sdpa(q, k, v, HEADS, skip_reshape=hnd, enable_gqa=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    q, k, v = tensors(dtype=dtype)
    exact = sdpa(q.float(), k.float(), v.float(), HEADS).to(dtype)
    assert_quantised(call(adapter.SageOverride("reference"), OldCore(), q, k, v, HEADS), exact)


def test_unknown_keywords_and_attn_precision_change_nothing():
    q, k, v = tensors()
    override = adapter.SageOverride("reference")
    plain = call(override, NewCore(), q, k, v, HEADS)
    more = {"attn_precision": torch.float32, "preferred_attention": object(), "smooth": 3, "invented_later": "x"}
    assert torch.equal(call(override, NewCore(), q, k, v, HEADS, **more), plain)
    assert override.record.ran == {"reference": 2}


@pytest.mark.parametrize("core", CORES)
def test_low_precision_attention_false_is_not_quantised(core):
    q, k, v = tensors()
    override, core = adapter.SageOverride("reference"), core()
    out = call(override, core, q, k, v, HEADS, low_precision_attention=False)
    assert torch.equal(out, sdpa(q, k, v, HEADS))
    assert core.own_calls[0][1]["low_precision_attention"] is False
    assert sum(override.record.kept.values()) == 1 and not override.record.fallbacks and not override.record.ran
    call(override, core, q, k, v, HEADS, low_precision_attention=True)
    assert override.record.ran == {"reference": 1}


@pytest.mark.parametrize("core", CORES)
def test_auto_leaves_cpu_tensors_to_the_model_and_that_is_no_fallback(core):
    q, k, v = tensors()
    override, core = adapter.SageOverride("auto"), core()
    assert torch.equal(call(override, core, q, k, v, HEADS), sdpa(q, k, v, HEADS))
    assert len(core.own_calls) == 1
    assert sum(override.record.kept.values()) == 1 and not override.record.fallbacks


def test_a_call_like_one_left_before_is_left_without_a_look_at_it(monkeypatch):
    override, core = adapter.SageOverride("auto"), NewCore()
    for hnd, mask in itertools.product((False, True), (None, torch.ones(LEN_Q, LEN_K, dtype=torch.bool))):
        given = tensors(hnd=hnd)
        call(override, core, *given, HEADS, mask, skip_reshape=hnd)
        with monkeypatch.context() as patch:
            for name in ("view", "transpose", "dim"):
                patch.setattr(torch.Tensor, name, lambda *a, name=name: pytest.fail(f"{name} of a tensor"))
            assert isinstance(override.prepare(*given, HEADS, mask, skip_reshape=hnd), str)
    assert list(override.record.kept.values()) == [4]
    # What the decision rests on beside the call makes it be taken again.
    with monkeypatch.context() as patch:
        patch.setenv("SAGEATTENTION_VARIANT", "reference")
        adapter.settings.forget()
        call(override, core, *tensors(), HEADS)
    adapter.settings.forget()
    assert override.record.ran == {"reference": 1}


@pytest.mark.parametrize("variant", ["auto", "reference"])
def test_what_is_remembered_of_calls_does_not_grow_without_bound(variant):
    override = adapter.SageOverride(variant)
    override.known.limit = 4
    for tokens in range(1, 12):
        call(override, OldCore(), *(torch.randn(1, tokens, 8) for _ in range(3)), 1)
        assert 0 < len(override.known) <= 4


def test_calls_that_differ_only_in_how_they_are_read_stay_apart():
    """[B, L, heads·D] of 4 tokens, 4 heads and rank 4 look alike; so do flags that change the output's layout."""
    override, core = adapter.SageOverride("reference"), NewCore()
    q, k, v = (torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    for flags in ({"skip_reshape": True}, {"skip_reshape": True, "skip_output_reshape": True}) * 2:
        assert_quantised(call(override, core, q, k, v, 4, **flags), sdpa(q, k, v, 4, **flags))
    flat = [t.flatten(2) for t in (q, k, v)]
    for heads in (2, 4, 2):
        assert_quantised(call(override, core, *flat, heads), sdpa(*flat, heads))
    with_fewer = [flat[0], flat[1][..., :32].contiguous(), flat[2][..., :32].contiguous()]
    for _ in range(2):
        call(override, core, *with_fewer, 4, enable_gqa=True)
        with pytest.raises(RuntimeError):  # the core's own: without the flag the heads have to be as many
            call(override, core, *with_fewer, 4)
    assert override.record.ran == {"reference": 9}


def test_a_computed_call_is_checked_and_planned_once_but_one_with_other_strides_scale_or_mask_again(monkeypatch):
    override, core = adapter.SageOverride("reference"), NewCore()
    q, k, v = tensors()
    wide = torch.cat([q, q], dim=2)[..., : q.shape[2]]  # equal to q, in other strides
    kept = torch.ones(LEN_Q, LEN_K, dtype=torch.bool).tril(3)
    forms = [((q, k, v, HEADS), {}), ((wide, k, v, HEADS), {}), ((q, k, v, HEADS), {"scale": 0.5}), ((q, k, v, HEADS, kept), {})]
    want = [call(override, core, *args, **options) for args, options in forms]
    assert len(override.known) == len(forms)
    for out, (args, options) in zip(want, forms):
        assert_quantised(out, sdpa(*args, **options))
    monkeypatch.setattr(adapter, "prepare", None)  # calling it would raise
    for out, (args, options) in zip(want, forms):
        assert torch.equal(call(override, core, *args, **options), out)
    assert override.record.ran == {"reference": 2 * len(forms)} and not core.own_calls
    call(override, core, q.clone().requires_grad_(), k, v, HEADS)
    assert "gradient" in reasons(override)[0] and len(override.known) == len(forms)


def test_an_override_is_pickled_without_its_counts():
    override = adapter.SageOverride("reference", sdpa)
    call(override, OldCore(), *tensors(), HEADS)
    copied = pickle.loads(pickle.dumps(override))
    assert (copied.variant, copied.previous) == ("reference", sdpa) and not copied.record.ran
    assert_quantised(call(copied, OldCore(), *tensors(), HEADS), sdpa(*tensors(), HEADS))


def test_the_model_s_own_attention_gets_the_call_unchanged():
    q, k, v = tensors()
    core, mask = OldCore(), torch.ones(LEN_Q, LEN_K, dtype=torch.bool)
    override = adapter.SageOverride("sageattn_qk_int8_pv_fp8_cuda")
    core.attention(q, k, v, HEADS, mask, transformer_options={KEY: override}, invented_later="x", _other=1)
    ((args, kwargs),) = core.own_calls
    assert all(a is b for a, b in zip(args, (q, k, v, HEADS, mask)))
    assert set(kwargs) == {"transformer_options", "invented_later", "_other", "_inside_attn_wrapper"}


def test_fallback_runs_the_override_that_was_there_before():
    q, k, v = tensors()
    seen = []

    def previous(func, *args, **kwargs):
        seen.append((func, kwargs))
        return func(*args, **kwargs)

    core = OldCore()
    override = adapter.SageOverride("sageattn_qk_int8_pv_fp8_cuda", previous)
    assert torch.equal(call(override, core, q, k, v, HEADS, shift=1), sdpa(q, k, v, HEADS))
    assert seen[0][0] == core.own and seen[0][1]["shift"] == 1
    call(adapter.SageOverride("auto", previous), core, q, k, v, HEADS)
    assert len(seen) == 2
    call(adapter.SageOverride("reference", previous), core, q, k, v, HEADS)
    assert len(seen) == 2  # what we can do, we do


REFUSED = {
    "a CPU tensor to a CUDA variant": ("sageattn_qk_int8_pv_fp8_cuda", {}, "NVIDIA GPU"),
    "an unknown variant": ("sageattn_of_tomorrow", {}, "sageattn_of_tomorrow"),
    "head_dim above 256": ("reference", {"q": (1, 8, 600), "k": (1, 8, 600), "v": (1, 8, 600), "heads": 2}, "300"),
    "heads that do not divide": ("reference", {"heads": 7}, "heads"),
    "batches that differ": ("reference", {"k": (1, LEN_K, HEADS * DIM), "v": (1, LEN_K, HEADS * DIM)}, "batch"),
    "a mask of other lengths": ("reference", {"mask": torch.zeros(3, 5)}, "attn_mask"),
    "an integer mask": ("reference", {"mask": torch.zeros(LEN_Q, LEN_K, dtype=torch.int32)}, "attn_mask"),
    "fewer heads without enable_gqa": ("reference", {"k": (2, LEN_K, 80), "v": (2, LEN_K, 80)}, "enable_gqa"),
    "rank 4 without skip_reshape": ("reference", {"q": (2, 4, LEN_Q, DIM)}, "q: got 4 dimensions"),
    "rank 3 with skip_reshape": ("reference", {"skip_reshape": True}, "q: got 3 dimensions"),
    "v unlike k": ("reference", {"v": (2, LEN_K + 1, HEADS * DIM)}, "v"),
    "a scale that is not finite": ("reference", {"scale": float("nan")}, "sm_scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_refuse_the_model_does_and_the_log_says_why_once(case, caplog):
    variant, changes, said = REFUSED[case]
    given = dict(zip("qkv", tensors()), heads=HEADS)
    given.update({name: torch.randn(x) if isinstance(x, tuple) else x for name, x in changes.items()})
    q, k, v = (given.pop(name) for name in "qkv")
    override, calls = adapter.SageOverride(variant), []

    def func(*args, **kwargs):  # what a core makes of such a call is its own affair
        calls.append(args)
        return q

    options = {KEY: override, "block_type": "double", "block_index": 3}
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert override(func, q, k, v, transformer_options=options, **given) is q
    assert len(calls) == 3
    assert len(reasons(override)) == 1 and said in reasons(override)[0]
    assert list(override.record.fallbacks.values()) == [3]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "double block 3" in caplog.text and said in caplog.text


def test_a_missing_kernel_falls_back_also_where_it_is_only_noticed_at_the_launch(monkeypatch):
    q, k, v = tensors()

    def run(call):
        raise PACK.sageattention.KernelMissing(call.plan.variant.name, "its cubin can't be loaded")

    monkeypatch.setattr(part("backends.emulation"), "run", run)
    override, core = adapter.SageOverride("reference"), OldCore()
    assert torch.equal(call(override, core, q, k, v, HEADS), sdpa(q, k, v, HEADS))
    assert reasons(override) == ["reference: its cubin can't be loaded"] and not override.record.ran


@pytest.mark.parametrize("core", CORES)
def test_auto_tries_its_next_candidate_where_a_kernel_is_missing(core, monkeypatch, caplog):
    """On a made-up card whose Triton has no C compiler."""
    calls, rules, candidate = [], part("planning.rules"), part("variants").Candidate(TRITON)
    monkeypatch.setattr(part("device.capability"), "of_device", lambda device, index: CARD)
    monkeypatch.setattr(rules, "choose", lambda *given: rules.Choice((candidate,), "a test", "static"))

    def missing(call):
        calls.append(call)
        raise PACK.sageattention.KernelMissing(TRITON, "no C compiler")

    monkeypatch.setitem(part("dispatch")._BACKENDS, "triton", SimpleNamespace(run=missing))
    q, k, v = tensors()
    override, core = adapter.SageOverride("auto"), core()
    for _ in range(3):
        assert torch.equal(call(override, core, q, k, v, HEADS), sdpa(q, k, v, HEADS))
    assert len(calls) == 1 and caplog.text.count(f"auto passes by {TRITON}: no C compiler") == 1
    assert override.record.as_dict() == {"ran": {}, "kept": {f"{TRITON}: no C compiler": 3}, "fallbacks": {}}


@pytest.mark.parametrize("core", CORES)
def test_a_call_without_heads_goes_on_to_the_attention_behind(core, caplog):
    q, k, v = tensors()
    override = adapter.SageOverride("reference")
    with pytest.raises(TypeError, match="heads"):  # the core's own, for it can't do without either
        call(override, core(), q, k, v)
    assert reasons(override) == ["heads: the call does not say how many there are"]


@pytest.mark.parametrize("error", ["CudaError", "OutOfMemoryError"])
def test_a_device_s_failure_is_not_swallowed(error, monkeypatch):
    q, k, v = tensors()
    kind = getattr(PACK.sageattention, error, None) or torch.OutOfMemoryError

    def run(call):
        raise kind("the device failed")

    monkeypatch.setattr(part("backends.emulation"), "run", run)
    core = OldCore()
    with pytest.raises(kind, match="the device failed"):
        call(adapter.SageOverride("reference"), core, q, k, v, HEADS)
    assert not core.own_calls


def test_training_keeps_its_gradient():
    q, k, v = tensors()
    override = adapter.SageOverride("reference")
    out = call(override, OldCore(), q.requires_grad_(), k, v, HEADS)
    assert out.requires_grad and "gradient" in reasons(override)[0]
    with torch.no_grad():
        call(override, OldCore(), q, k, v, HEADS)
    assert override.record.ran == {"reference": 1}


def test_a_forward_mode_gradient_is_the_model_s_own():
    q, k, v = tensors(dtype=torch.float64)  # which SDPA has a formula for
    override = adapter.SageOverride("reference")
    with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = call(override, OldCore(), torch.autograd.forward_ad.make_dual(q, q), k, v, HEADS)
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    assert "gradient" in reasons(override)[0]


@pytest.mark.parametrize("variant", ["auto", "reference"])
def test_tracing_and_torch_func_see_the_model_s_own_attention(variant):
    q, k, v = tensors()
    override, core = adapter.SageOverride(variant), OldCore()

    def layer(q, k, v):
        return call(override, core, q, k, v, HEADS)

    traced, exact = torch.jit.trace(layer, (q, k, v), check_trace=False), sdpa(q, k, v, HEADS)
    torch.testing.assert_close(traced(q, k, v), exact)
    mapped = torch.func.vmap(layer, (0, None, None))(torch.stack([q, q]), k, v)
    torch.testing.assert_close(mapped[1], exact)
    assert not override.record.ran and len(reasons(override)) == 1 and "torch.func" in reasons(override)[0]


def contained(*given: torch.Tensor) -> list[Container]:
    return [Container(t) for t in given]


@pytest.mark.parametrize("hnd", [False, True])
def test_containers(hnd):
    q, k, v = tensors(hnd=hnd)
    override, core = adapter.SageOverride("reference"), NewCore()
    for _ in range(2):
        out = call(override, core, *contained(q, k, v), HEADS, skip_reshape=hnd)
        assert_quantised(out, sdpa(q, k, v, HEADS, skip_reshape=hnd))
    assert override.record.as_dict() == {"ran": {"reference": 2}, "kept": {}, "fallbacks": {}} and not core.own_calls


@pytest.mark.parametrize("variant", ["auto", "sageattn_qk_int8_pv_fp8_cuda"])
@pytest.mark.parametrize("previous", ["none", "plain", "containers"])
def test_containers_that_are_not_ours_go_on_untaken(previous, variant, monkeypatch):
    q, k, v = tensors()
    core, seen = NewCore(), []
    for name, module in core.importable().items():
        monkeypatch.setitem(sys.modules, name, module)

    def before(func, *args, **kwargs):
        seen.append(type(args[0]))
        return func(*args, **kwargs)

    def before_with_containers(*args, **kwargs):
        seen.append(type(args[0]))
        return core.own(*args, **kwargs)

    if previous == "containers":
        before.container_function = before_with_containers
    override = adapter.SageOverride(variant, None if previous == "none" else before)
    held = contained(q, k, v)
    assert torch.equal(call(override, core, *held, HEADS, invented_later=1), sdpa(q, k, v, HEADS))
    assert seen == {"none": [], "plain": [torch.Tensor], "containers": [Container]}[previous]
    assert all(c.tensor is None for c in held) and core.own_calls[0][1]["invented_later"] == 1
    assert not override.record.ran and sum((override.record.kept + override.record.fallbacks).values()) == 1


class Keeper:
    """A backend that keeps what it is given, and tells of each call how it came and which of q, k and v somebody still had."""

    def __init__(self) -> None:
        self.told: list[tuple[str, list[bool]]] = []
        self.references: list[weakref.ref] = []

    def _tell(self, how: str) -> None:
        self.told.append((how, [ref() is not None for ref in self.references]))

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, problem) -> torch.Tensor:
        return sdpa(*(t.flatten(2) for t in (q, k, v)), HEADS, scale=problem.sm_scale).unflatten(2, (HEADS, DIM))

    def load(self, problem, plan) -> None:
        pass

    def run(self, call):
        self._tell("into q" if call.into_q else "whole")
        out, lse = call.result()
        out.copy_(self._attend(call.q, call.k, call.v, call.problem))
        return out, lse

    def quantize(self, k, v, problem, plan, mask):
        return k.clone(), v.clone()

    def attend(self, q, kv, problem, mask):
        self._tell("halves")
        return self._attend(q, *kv, problem), None


@pytest.fixture
def keeper(monkeypatch) -> Keeper:
    """On a made-up card."""
    backend = Keeper()
    monkeypatch.setattr(part("device.capability"), "of_device", lambda device, index: CARD)
    monkeypatch.setitem(part("dispatch")._BACKENDS, "triton", backend)
    monkeypatch.setattr(part("dispatch"), "_compiled", set())
    return backend


@pytest.mark.parametrize("hnd_in", [False, True])
@pytest.mark.parametrize("holds", ["nothing", "q", "k"])
def test_containers_are_used_up(hnd_in, holds, keeper):
    """The output takes q's place; else K and V go before it is made. What somebody has stays as it is."""
    override, core = adapter.SageOverride(TRITON), NewCore()
    for _ in range(2):
        q, k, v = tensors()
        given = contained(*([t.unflatten(2, (HEADS, DIM)).transpose(1, 2) for t in (q, k, v)] if hnd_in else [q, k, v]))
        kept, where = {"nothing": None, "q": q, "k": k}[holds], q.data_ptr()
        keeper.references = [weakref.ref(c.tensor) for c in given]
        del q, k, v
        out = call(override, core, *given, HEADS, skip_reshape=hnd_in)
        assert all(c.tensor is None for c in given)
    # The first call proves that the kernel is there: until then the tensors are needed, should the model have to do it.
    first, (how, alive) = keeper.told
    assert first == ("whole", [True] * 3)
    assert how == {"nothing": "into q", "q": "halves", "k": "into q"}[holds] and (out.data_ptr() == where) is (holds != "q")
    assert alive == [name == holds and not hnd_in for name in "qkv"]
    if kept is not None:
        assert torch.equal(kept, tensors()["qk".index(holds)])
    torch.testing.assert_close(out, sdpa(*tensors(), HEADS))
    assert override.record.ran == {TRITON: 2} and not override.record.fallbacks


def test_one_fused_buffer_in_containers_holds_the_output(keeper):
    """As MiniMax H3 hands them over: [1, H, N, D] views of one projection's result."""
    override, core = adapter.SageOverride(TRITON), NewCore()
    for model_keeps in (False, True, False):  # the first call compiles
        fused = torch.randn(TOKENS_H3, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(2))
        parts = [t.view(TOKENS_H3, HEADS, DIM).transpose(0, 1)[None] for t in fused.split(HEADS * DIM, -1)]
        expected, where, given = sdpa(*parts, HEADS, skip_reshape=True), fused.data_ptr(), contained(*parts)
        kept = fused if model_keeps else None
        del fused, parts
        out = call(override, core, *given, HEADS, skip_reshape=True)
        del kept
        torch.testing.assert_close(out, expected)
    assert [how for how, _ in keeper.told] == ["whole", "whole", "into q"]
    assert out.data_ptr() == where and out.stride()[1:] == (3 * HEADS * DIM, 1)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (None, ""),
        ({}, ""),
        ({"block": ("input", 4), "block_index": 0}, "input block 4.0"),
        ({"block": ("middle", 0)}, "middle block 0"),
        ({"block_index": 7}, "block 7"),
        ({"block_type": "single", "block_index": 7}, "single block 7"),
        ({"block": 3, "block_index": 7}, "block 7"),  # other packs' own notions: a name in the log is no reason to fail
        ({"block": (), "block_index": 7}, "block 7"),
        ("options", ""),
    ],
)
def test_layer_name(options, name):
    assert sampling.layer_name(options) == name


def test_what_runs_is_logged_once(caplog):
    override = adapter.SageOverride("reference")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            call(override, OldCore(), *tensors(), HEADS)
    assert [r.getMessage() for r in caplog.records] == ["PatchSageAttention: attention runs on reference"]


def test_reasons_do_not_grow_without_bound(caplog):
    kept = record.Record()
    for i in range(3 * record.MAX_REASONS):
        kept.count_fallback(f"reason {i}", "")
    assert len(kept.fallbacks) == record.MAX_REASONS + 1
    assert sum(kept.fallbacks.values()) == 3 * record.MAX_REASONS
    assert len(caplog.records) == record.MAX_REASONS + 1
    kept.reset()
    assert kept.as_dict() == {"ran": {}, "kept": {}, "fallbacks": {}}


def test_counts_of_many_threads_add_up():
    counted = record.Record()
    threads = [threading.Thread(target=lambda: [counted.count_run("reference") for _ in range(2000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted.ran == {"reference": 16000}


def test_a_clone_shares_the_override():
    override = adapter.SageOverride("reference")
    assert copy.deepcopy({"transformer_options": {KEY: override}})["transformer_options"][KEY] is override
    assert Model(override).clone().options[KEY] is override


def test_compiled_model_counts_and_does_not_recompile():
    override = adapter.SageOverride("reference")
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    def layer(q, k, v):
        return override(sdpa, q + 1, k, v, HEADS, transformer_options={KEY: override}) * 2

    q, k, v = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend)
    first = compiled(q, k, v)
    after_first = len(graphs)
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), first)
    assert len(graphs) == after_first and override.record.ran == {"reference": 4}
    assert_quantised(first, sdpa(q + 1, k, v, HEADS) * 2)


def ready_on_gpu() -> list[str]:
    found = PACK.sageattention.available_variants("cuda") if torch.cuda.is_available() else []
    return [a.name for a in found if a.status == "ready" and a.name != "sdpa"]


@pytest.mark.gpu
@pytest.mark.parametrize(("hnd_in", "hnd_out"), list(itertools.product([False, True], repeat=2)))
def test_every_variant_of_this_gpu(hnd_in, hnd_out):
    flags = {"skip_reshape": hnd_in, "skip_output_reshape": hnd_out}
    q, k, v = (t.cuda() for t in tensors(hnd=hnd_in, dtype=torch.float16))
    mask = (torch.rand(BATCH, LEN_Q, LEN_K, generator=torch.Generator().manual_seed(4)) > 0.3).cuda()
    mask[..., 0] = True
    exact = sdpa(q.float(), k.float(), v.float(), HEADS, mask, **flags).half()
    assert len(ready_on_gpu()) > 1
    for variant in ready_on_gpu():
        override = adapter.SageOverride(variant)
        for _ in range(2):  # the second call lets go of K and V early
            out = call(override, NewCore(), *contained(q, k, v), HEADS, mask, **flags)
            assert out.shape == exact.shape and out.dtype == exact.dtype
            assert float((out.float() - exact.float()).norm() / exact.float().norm()) < 0.06
        assert override.record.as_dict() == {"ran": {variant: 2}, "kept": {}, "fallbacks": {}}


@pytest.mark.gpu
@pytest.mark.parametrize("holds", ["nothing", "q"])
def test_containers_lower_the_peak_of_memory(holds):
    """Of heads that share keys: where q is somebody's, quantised K and V are smaller than the output that is made when K and V are gone."""
    override, core = adapter.SageOverride("sageattn_qk_int8_pv_int8_cuda"), NewCore()
    heads, heads_kv = 24, 6

    def peak(in_containers: bool) -> int:
        given = [torch.randn(1, h, 8192, 128, device="cuda", dtype=torch.float16) for h in (heads, heads_kv, heads_kv)]
        torch.cuda.reset_peak_memory_stats()
        handed, kept = contained(*given) if in_containers else given, given[0] if holds == "q" else None
        given = None
        call(override, core, *handed, heads, skip_reshape=True, skip_output_reshape=True, enable_gqa=True)
        del kept
        return torch.cuda.max_memory_allocated()

    peak(False)
    lower = 2 * heads_kv if holds == "q" else heads  # K and V, or the output
    assert peak(False) - peak(True) > 0.9 * lower * 8192 * 128 * 2


@pytest.mark.gpu
def test_a_long_video_in_containers_peaks_at_q_k_v_and_a_workspace():
    """MiniMax H3, 15 seconds at 768p, twice: the first call may have to be looked at."""
    tokens, heads, dim = 104_050, 56, 128
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    override, core = adapter.SageOverride("auto"), NewCore()
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        fused = torch.randn(tokens, 3 * heads * dim, device="cuda", dtype=torch.bfloat16)
        where, given = (
            fused.data_ptr(),
            contained(*(t.view(tokens, heads, dim).transpose(0, 1)[None] for t in fused.split(heads * dim, -1))),
        )
        del fused
        torch.cuda.reset_peak_memory_stats()
        out = call(override, core, *given, heads, skip_reshape=True)
        assert out.shape == (1, tokens, heads * dim) and out.data_ptr() == where
        peak = torch.cuda.max_memory_allocated() - before
        del out, given
    assert peak <= 3 * tokens * heads * dim * 2 + (256 << 20) and not override.record.fallbacks and not override.record.kept
