"""`SageSparseAttention`: which calls it computes sparsely and how, and where it stands among other overrides."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Container, Model, NewCore, OldCore, sdpa  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
NODE = PACK.NODE_CLASS_MAPPINGS["SageSparseAttention"]
DENSE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
slot, forward, record = PACK.nodes.slot, PACK.nodes.forward, PACK.nodes.record


def part(name: str) -> ModuleType:
    return importlib.import_module(f"{PACK.__name__}.nodes.{name}")


sparse_override, sparse_settings, grid, budgets, vsa = map(part, ("sparse_override", "sparse_settings", "grid", "budgets", "vsa"))
sageattn_sparse = PACK.sageattention.sageattn_sparse
block_order = importlib.import_module(f"{PACK.sageattention.__name__}.block_order")

BATCH, HEADS, DIM = 2, 4, 32
GRID = (3, 8, 10)  # tokens
TOKENS = 240
LATENT = (BATCH, 16, 3, 16, 20)
PATCH = (1, 2, 2)
HERE = {"variant": "reference", "min_tokens": 64, "start_percent": 0.0}


def tensors(tokens: int = TOKENS, heads_kv: int = HEADS, hnd: bool = False, batch: int = BATCH) -> list[torch.Tensor]:
    """Smooth along the tokens, so that blocks differ in what they matter."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(batch, heads, tokens, DIM, generator=generator).cumsum(2) / 4 for heads in (HEADS, heads_kv, heads_kv)]
    return made if hnd else [t.transpose(1, 2).flatten(2) for t in made]


def options(override, latent=LATENT, patch=PATCH, text=0, text_last=False, **more):
    return {KEY: override, forward.KEY: forward.Forward(latent, patch, text, text_last), **more}


def node(model: Model | None = None, **given) -> Model:
    return NODE().execute(model or Model(), **(HERE | given))[0]


def override_of(**given):
    return sparse_override.SparseOverride(sparse_settings.Settings.parse(HERE | given))


def by_heads(*flat: torch.Tensor) -> list[torch.Tensor]:
    return [t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in flat]


def counts(override) -> dict[str, dict[str, int]]:
    return override.record.as_dict()


def reasons(override) -> str:
    found = counts(override)
    return "; ".join((*found["kept"], *found["fallbacks"]))


# Settings


def test_settings_default_to_the_core_node_s_numbers():
    found = sparse_settings.Settings.parse({})
    assert (found.method, found.value) == ("mass", 2.0)
    assert (found.window.start, found.window.end, found.min_tokens, found.sinks) == (0.2, 1.0, 12_288, "exact_kv_and_rows")
    for name, number, default, low, high in (
        ("sol-attn", "tau", 1.3, 0.0, 4.0), ("sla", "keep_percent", 10.0, 0.5, 95.0), ("vsa", "keep_percent", 10.0, 0.5, 95.0),
    ):  # fmt: skip
        assert sparse_settings.METHODS[name].number[:4] == (number, default, low, high)


@pytest.mark.parametrize(
    "selection",
    [
        {"selection": "sla", "selection.keep_percent": 20},
        {"selection": {"selection": "sla", "keep_percent": 20}},
        {"selection": "sla", "selection.keep_percent": 20, "selection.tau": 3.0},  # of a core that shows all numbers
    ],
)
def test_a_prompt_of_the_core_s_node_carries_over_nested_or_flat(selection):
    rest = {
        "start_percent": 0.3, "end_percent": 0.9, "dense_blocks": "0, 1, 47-49", "min_tokens": 4096, "extra_tokens": 128,
        "sink_conditioning": "exact_kv", "verbose": True,
    }  # fmt: skip
    found = sparse_settings.Settings.parse(selection | rest)
    assert (found.method, found.threshold, found.named) == ("sla", pytest.approx(0.2), "sla 20 %")
    assert (found.window.start, found.window.end, found.min_tokens) == (0.3, 0.9, 4096)
    assert found.dense_blocks == {0, 1, 47, 48, 49} and found.sinks == "exact_kv" and found.verbose


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"selection": "best"}, "one of mass, sol-attn"),
        ({"selection": {"selection": "sol-attn", "tau": -1}}, "selection.tau is -1"),
        ({"start_percent": 0.9, "end_percent": 0.5}, "start_percent"),
        ({"start_percent": 1.5}, "start_percent"),
        ({"dense_blocks": "0, one"}, "dense_blocks: 'one'"),
        ({"selection": "sla", "selection.keep_percent": 96}, "from 0.5 to 95"),
        ({"selection": "mass", "selection.tau": float("nan")}, "selection.tau is nan"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"sink_conditioning": "all"}, "exact_kv_and_rows"),
        ({"token_order": "8x8"}, "frame-major"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(given, said):
    with pytest.raises(ValueError, match=r"\.$") as refused:
        NODE().execute(Model(), **given)
    assert said in str(refused.value)
    if given.keys() <= {"selection", "start_percent", "end_percent", "dense_blocks"}:  # ComfyUI checks the ranges of the others itself
        assert NODE.VALIDATE_INPUTS(**given) == str(refused.value)


def test_the_report_gets_the_node_s_inputs():
    given = {"selection": "cdf", "selection.hold_percent": 50.0, "dense_blocks": "0-1, 47-49", "end_percent": 0.9, "variant": "reference"}
    told = slot.owner(NODE().execute(Model(), **given)[0]).settings()
    assert told.pop("node") == "SageSparseAttention" and given.items() <= told.items()
    assert sparse_settings.Settings.parse(told) == sparse_settings.Settings.parse(given)


def test_an_input_that_is_connected_is_not_known_at_validation():
    assert NODE.VALIDATE_INPUTS(selection="mass", start_percent=None, dense_blocks=None) is True and NODE.VALIDATE_INPUTS() is True


def test_flat_inputs_begin_with_what_a_nested_core_shows_for_the_default():
    """A saved workflow lists widgets' values in their order."""
    names = list(NODE.INPUT_TYPES()["optional"])
    assert names[:11] == [
        "selection", "selection.tau", "start_percent", "end_percent", "dense_blocks", "min_tokens", "extra_tokens", "sink_conditioning",
        "verbose", "token_order", "variant",
    ]  # fmt: skip
    assert {f"selection.{m.number.name}" for m in sparse_settings.METHODS.values()} <= set(names)


def test_tooltips_fit():
    for kind, extra in NODE.INPUT_TYPES()["optional"].values():
        lines = extra["tooltip"].splitlines()
        assert len(lines) <= 6 and max(map(len, lines)) <= 100, (kind, lines)


def test_a_variant_that_this_machine_lacks_loads_and_auto_runs(caplog):
    given = {"selection": "mass", "variant": "sageattn_qk_int8_pv_fp8_cuda"}
    assert NODE.VALIDATE_INPUTS(**given) is True
    assert slot.owner(NODE().execute(Model(), **given)[0]).chosen.variant == "auto"
    assert "'auto' is used instead" in caplog.text


# The grid


@pytest.mark.parametrize(
    ("tokens", "told", "found"),
    [
        (240, ((1, 16, 3, 16, 20), (1, 2, 2)), (3, 8, 10, 0, 0)),
        (240, ((1, 16, 3, 15, 19), (1, 2, 2)), (3, 8, 10, 0, 0)),  # padded to whole patches
        (320, ((1, 16, 3, 16, 20), (1, 2, 2), 512), (4, 8, 10, 0, 0)),  # a reference frame; the text is not among the tokens
        (340, ((1, 16, 3, 16, 20), (1, 2, 2), 100), (3, 8, 10, 100, 0)),
        (340, ((1, 16, 3, 16, 20), (1, 2, 2), 100, True), (3, 8, 10, 0, 100)),
        (960, ((1, 128, 3, 16, 20), (1, 1, 1)), (3, 16, 20, 0, 0)),
        (4096 + 77, ((1, 16, 128, 128), (1, 2, 2), 77), (1, 64, 64, 77, 0)),
        (341, ((1, 16, 3, 16, 20), (1, 2, 2), 100), "101 tokens beside"),
        (200, ((1, 16, 3, 16, 20), (1, 2, 2), 100), "fewer than"),
        (240, ((), (1, 2, 2)), "does not tell"),
        (240, ((1, 16, 3, 16, 20), None), "does not tell"),
    ],
)
def test_grid(tokens, told, found):
    here = grid.find(tokens, {forward.KEY: forward.Forward(*told)})
    assert found in here if isinstance(found, str) else here[:5] == found and here.tokens == tokens


H3 = SimpleNamespace(
    seq_len=300,
    signature=(30, 3, 16, 20, 15),
    segments=((0, 20, "text"), (20, 30, "ref_img"), (30, 60, "audio"), (60, 300, "video")),
)  # fmt: skip


def test_grid_of_h3_is_its_own_table():
    here = grid.find(300, {"minimax_h3_layout": H3})
    assert here[:5] == (3, 8, 10, 60, 0) and here.exact_rows == (30, 60) and here.segments == (20, 10, 30)
    assert isinstance(grid.find(299, {"minimax_h3_layout": H3}), str)  # a refiner's tokens, not those of the layout
    crooked = SimpleNamespace(seq_len=300, signature=(30, 3, 16, 22, 15), segments=H3.segments)
    assert "240 tokens" in grid.find(300, {"minimax_h3_layout": crooked})


@pytest.mark.parametrize(
    ("network", "patch"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 2, 2)),
        ({"patch_size": [1, 2, 2]}, (1, 2, 2)),
        ({"patch_size": 2}, (1, 2, 2)),
        ({"patch_size": [1, 1]}, (1, 1, 1)),
        ({"patchifier": SimpleNamespace(patch_size=(1, 1, 1))}, (1, 1, 1)),
        ({"patch_spatial": 2, "patch_temporal": 1}, (1, 2, 2)),
        ({}, None),
        ({"patch_size": "two"}, None),
    ],
)
def test_a_pass_tells_its_latent_and_the_model_s_patch(network, patch):
    model, seen = node(), []
    (wrapper,) = model.wrappers[forward.APPLY_MODEL][forward.KEY]

    class Executor:
        class_obj = SimpleNamespace(diffusion_model=SimpleNamespace(**network))

        def __call__(self, *args, **kwargs):
            seen.append((args, kwargs))
            return "denoised"

    latent, text, given = torch.zeros(LATENT), torch.zeros(2, 77, 8), {"sigmas": torch.ones(1)}
    assert wrapper(Executor(), latent, torch.ones(2), None, text, None, given, txt_byt5=torch.zeros(2, 5, 8), y=1) == "denoised"
    args, kwargs = seen[0]
    assert args[0] is latent and kwargs["y"] == 1 and args[5]["sigmas"] is given["sigmas"] and forward.KEY not in given
    assert args[5][forward.KEY] == forward.Forward(LATENT, patch, 82, False)


def test_patching_twice_observes_once():
    assert len(node(node()).wrappers[forward.APPLY_MODEL][forward.KEY]) == 1


# What is computed


@pytest.mark.parametrize(("hnd_in", "hnd_out"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("core", [OldCore, NewCore])
def test_a_long_call_is_sageattn_sparse_in_cubes(core, hnd_in, hnd_out):
    q, k, v = tensors(hnd=hnd_in)
    override, core = override_of(), core()
    out = core.attention(q, k, v, HEADS, transformer_options=options(override), skip_reshape=hnd_in, skip_output_reshape=hnd_out)
    four = (q, k, v) if hnd_in else by_heads(q, k, v)
    order = block_order.cube_order(*GRID, (2, 8, 4))
    expected = sageattn_sparse(*four, selection="mass", tau=2.0, order=order, variant="reference")
    torch.testing.assert_close(out, expected if hnd_out else expected.transpose(1, 2).flatten(2), rtol=0, atol=0)
    assert counts(override) == {"ran": {"sparse reference": 1}, "kept": {}, "fallbacks": {}} and not core.own_calls
    far = sdpa(q, k, v, HEADS, skip_reshape=hnd_in, skip_output_reshape=hnd_out)
    assert float((out - far).norm() / far.norm()) > 1e-3  # sparse it is


@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ({"selection": "sol-attn", "selection.tau": 1.0}, {"selection": "sol", "tau": 1.0}),
        ({"selection": "sla", "selection.keep_percent": 30.0}, {"selection": "topk", "keep": 0.3}),
        ({"selection": "cdf", "selection.hold_percent": 60.0}, {"selection": "cdf", "keep": 0.6}),
        ({"selection": "mass", "token_order": "4x4x4"}, {"selection": "mass", "cube": (4, 4, 4)}),
        ({"selection": "mass", "token_order": "frame-major"}, {"selection": "mass", "cube": None}),
    ],
)
def test_methods_and_orders(given, arguments):
    q, k, v = tensors()
    cube = arguments.pop("cube", (2, 8, 4))
    order = None if cube is None else block_order.cube_order(*GRID, cube)
    expected = sageattn_sparse(*by_heads(q, k, v), order=order, variant="reference", **arguments)
    override = override_of(**given)
    out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override))
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


def test_radial_is_the_static_mask_of_the_grid():
    q, k, v = tensors()
    override = override_of(selection="radial", **{"selection.decay_factor": 0.5})
    out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override))
    mask = block_order.radial_block_mask(3, 80, decay=0.5)
    expected = sageattn_sparse(*by_heads(q, k, v), selection="static", block_mask=mask, variant="reference")
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))
    core = OldCore()
    core.attention(q, k, v, HEADS, transformer_options={KEY: override})  # of no pass: there is no grid
    assert len(core.own_calls) == 1 and "radial needs the token grid" in reasons(override)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("sinks", "keys", "rows"), [("exact_kv_and_rows", True, True), ("exact_kv", True, False), ("off", False, False)]
)  # fmt: skip
def test_text_is_exact(last, sinks, keys, rows):
    q, k, v = tensors(TOKENS + 70)
    override = override_of(sink_conditioning=sinks)
    out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override, text=70, text_last=last))
    text = (TOKENS, TOKENS + 70) if last else (0, 70)
    order = block_order.cube_order(*GRID, (2, 8, 4), **{"suffix" if last else "prefix": 70})
    expected = sageattn_sparse(
        *by_heads(q, k, v), selection="mass", order=order, sinks=text if keys else (), query_sinks=text if rows else (),
        variant="reference",
    )  # fmt: skip
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


def test_h3_comes_in_containers_of_one_fused_buffer_with_its_prefix_exact():
    fused = torch.randn(300, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(2))
    q, k, v = (t.view(300, HEADS, DIM).transpose(0, 1)[None] for t in fused.split(HEADS * DIM, -1))
    held = [Container(t) for t in (q, k, v)]
    override = override_of()
    given = {KEY: override, "minimax_h3_layout": H3, "block_index": 3}
    out = NewCore().attention(*held, HEADS, preferred_attention=None, mask=None, skip_reshape=True, transformer_options=given)
    order = block_order.cube_order(*GRID, (2, 8, 4), prefix=60)
    expected = sageattn_sparse(q, k, v, selection="mass", order=order, sinks=60, query_sinks=(30, 60), variant="reference")
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))
    assert all(container.tensor is None for container in held)  # let go of


def test_grouped_queries_and_scale():
    q, k, v = tensors(heads_kv=2)
    override = override_of()
    out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override), enable_gqa=True, scale=0.1)
    order = block_order.cube_order(*GRID, (2, 8, 4))
    expected = sageattn_sparse(*by_heads(q, k, v), selection="mass", order=order, sm_scale=0.1, variant="reference")
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


def test_an_unknown_grid_keeps_the_tokens_order_and_says_so(caplog):
    q, k, v = tensors()
    override = override_of()
    for _ in range(3):
        out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override, latent=()))
    assert torch.equal(out, sageattn_sparse(*by_heads(q, k, v), selection="mass", variant="reference").transpose(1, 2).flatten(2))
    assert caplog.text.count("Tokens keep their own order: the model does not tell") == 1
    assert len(override.record.notes) == 1


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (BATCH, 1), (BATCH, 1, 1), (1,)])
def test_a_mask_of_padding_is_a_key_mask(shape, additive):
    q, k, v = tensors(TOKENS + 70)
    live = torch.ones(*shape, TOKENS + 70, dtype=torch.bool)
    live[..., TOKENS + 40 :] = False
    mask = torch.zeros(live.shape).masked_fill(~live, torch.finfo(torch.float32).min) if additive else live
    override, core = override_of(), NewCore()
    out = core.attention(q, k, v, HEADS, mask, transformer_options=options(override, text=70, text_last=True))
    order, text = block_order.cube_order(*GRID, (2, 8, 4), suffix=70), (TOKENS, TOKENS + 70)
    expected = sageattn_sparse(
        *by_heads(q, k, v), selection="mass", order=order, sinks=text, query_sinks=text, variant="reference",
        key_mask=live.reshape(-1, TOKENS + 70).expand(BATCH, -1),
    )  # fmt: skip
    assert torch.equal(out, expected.transpose(1, 2).flatten(2)) and not core.own_calls


def test_a_mask_that_hides_nothing_is_none():
    q, k, v = tensors()
    override = override_of()
    plain = NewCore().attention(q, k, v, HEADS, transformer_options=options(override))
    assert torch.equal(NewCore().attention(q, k, v, HEADS, torch.zeros(1, 1, TOKENS), transformer_options=options(override)), plain)


# What stays dense

MASKS = {
    "of each query": (torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), "differs between queries"),
    "of each head": (torch.ones(BATCH, HEADS, 1, TOKENS, dtype=torch.bool), "differs between queries or heads"),
    "that weighs keys": (torch.full((1, 1, TOKENS), -0.5), "adds to scores"),
}


@pytest.mark.parametrize("case", MASKS)
def test_other_masks_are_dense(case):
    q, k, v = tensors()
    mask, said = MASKS[case]
    override, core = override_of(), NewCore()
    assert torch.equal(core.attention(q, k, v, HEADS, mask, transformer_options=options(override)), sdpa(q, k, v, HEADS, mask))
    assert said in reasons(override) and len(core.own_calls) == 1


@pytest.mark.parametrize(
    ("given", "call", "said"),
    [
        ({"min_tokens": 241}, {}, "under 241 tokens"),
        ({"variant": "auto"}, {}, "NVIDIA"),
        ({}, {"low_precision_attention": False}, "full precision"),
        ({"dense_blocks": "0-2"}, {"block_index": 1}, "dense_blocks (0-2)"),
    ],
)
def test_calls_that_stay_dense(given, call, said):
    q, k, v = tensors()
    override, core = override_of(**given), NewCore()
    block = {"block_index": call.pop("block_index")} if "block_index" in call else {}
    out = core.attention(q, k, v, HEADS, transformer_options=options(override, **block), **call)
    assert torch.equal(out, sdpa(q, k, v, HEADS)) and said in reasons(override) and not counts(override)["ran"]


def test_cross_attention_and_gradients_stay_dense():
    q, k, v = tensors()
    override = override_of()
    NewCore().attention(q, k[:, :100], v[:, :100], HEADS, transformer_options=options(override))
    out = NewCore().attention(q.requires_grad_(), k, v, HEADS, transformer_options=options(override))
    assert out.requires_grad and "cross attention" in reasons(override) and "gradient" in reasons(override)


def test_dense_blocks_without_a_report_of_blocks_has_no_effect_and_says_so():
    q, k, v = tensors()
    override = override_of(dense_blocks="0")
    NewCore().attention(q, k, v, HEADS, transformer_options=options(override))
    assert counts(override)["ran"] and any("does not report its blocks" in note for note in override.record.notes)


def sampling(override, sigmas: list[float], layers: int = 1, core=None, **more) -> list[torch.Tensor]:
    """Calls as a sampler with these sigmas makes them, where percent and sigma add up to 1."""
    override.record.begin(lambda percent: 1.0 - percent)
    q, k, v = tensors()
    core, schedule, outs = core or NewCore(), torch.tensor([*sigmas, 0.0]), []
    for sigma in sigmas:
        here = options(override, sigmas=torch.tensor([sigma]), sample_sigmas=schedule, cond_or_uncond=[0], **more)
        for layer in range(layers):
            outs.append(core.attention(q, k, v, HEADS, transformer_options={**here, "block_index": layer}))
    override.record.end()
    return outs


@pytest.fixture
def never_crowded(monkeypatch):
    """Four blocks are so few that the neighbours alone are most of them."""
    monkeypatch.setattr(part("shares"), "MAX_SHARE", 1.0)


def test_steps_outside_of_the_window_are_dense(never_crowded):
    override = override_of(start_percent=0.25, end_percent=0.75)
    outs, dense = sampling(override, [1.0, 0.8, 0.6, 0.4, 0.2]), sdpa(*tensors(), HEADS)
    assert [torch.equal(out, dense) for out in outs] == [True, True, False, False, True]
    assert counts(override)["ran"] == {"sparse reference": 2} and "outside of 0.25 to 0.75" in reasons(override)


def test_layers_that_need_most_blocks_are_dense_from_the_step_after():
    override = override_of(selection="sla", **{"selection.keep_percent": 90.0})
    outs, dense = sampling(override, [0.9, 0.6, 0.3], layers=2), sdpa(*tensors(), HEADS)
    assert [torch.equal(out, dense) for out in outs] == [False] * 2 + [True] * 4
    assert "of the blocks were needed" in reasons(override)
    assert not torch.equal(sampling(override, [0.9])[0], dense)  # the next sampling looks again


def test_a_layout_is_made_once(monkeypatch):
    q, k, v = tensors()
    override, seen = override_of(), []
    monkeypatch.setattr(sparse_override, "sageattn_sparse", lambda *a, **kw: seen.append(kw) or sageattn_sparse(*a, **kw))
    for _ in range(3):
        NewCore().attention(q, k, v, HEADS, transformer_options=options(override))
    assert len({id(kw["order"]) for kw in seen}) == 1 and len(seen) == 3
    for frames in range(1, 60):
        override._layout(frames * 80, options(override, latent=(1, 16, frames, 16, 20)), torch.device("cpu"))
    assert len(override._layouts) <= sparse_override.MAX_LAYOUTS


def test_a_device_s_failure_is_not_swallowed(monkeypatch):
    def run(*args, **kwargs):
        raise torch.OutOfMemoryError("the device failed")

    monkeypatch.setattr(sparse_override, "sageattn_sparse", run)
    q, k, v = tensors()
    override = override_of()
    with pytest.raises(torch.OutOfMemoryError):
        NewCore().attention(q, k, v, HEADS, transformer_options=options(override))


def test_a_missing_kernel_falls_back_with_its_layer(monkeypatch, caplog):
    def run(*args, **kwargs):
        raise PACK.sageattention.KernelMissing("auto", "no block-sparse kernel runs here")

    monkeypatch.setattr(sparse_override, "sageattn_sparse", run)
    q, k, v = tensors()
    override = override_of()
    out = NewCore().attention(q, k, v, HEADS, transformer_options=options(override, block_index=7))
    assert torch.equal(out, sdpa(q, k, v, HEADS)) and "block 7" in caplog.text and "SageSparseAttention: fell back" in caplog.text


# Beside other overrides


@pytest.mark.parametrize("sparse_first", [False, True])
def test_it_stands_in_front_of_the_dense_override_in_either_order(sparse_first):
    nodes = [lambda model: node(model), lambda model: DENSE().execute(model, "reference")[0]]
    model = Model()
    for one in nodes if sparse_first else reversed(nodes):
        model = one(model)
    front = slot.owner(model)
    assert isinstance(front, sparse_override.SparseOverride) and front.previous.variant == "reference" and front.previous.previous is None
    q, k, v = tensors()
    core = NewCore()
    here = {**options(front), record.KEY: slot.record_of(model)}
    core.attention(q, k, v, HEADS, transformer_options=here)
    short = [t[:, :40] for t in (q, k, v)]
    out = core.attention(*short, HEADS, transformer_options=here)
    exact = sdpa(*short, HEADS)
    assert not core.own_calls and 1e-5 < float((out - exact).norm() / exact.norm()) < 0.02  # the dense variant did it
    assert slot.record_of(model).as_dict()["ran"] == {"sparse reference": 1, "reference": 1}


def test_a_dense_call_in_containers_goes_on_in_them():
    model = node(DENSE().execute(Model(), "reference")[0])
    held = [Container(t[:, :40]) for t in tensors()]
    NewCore().attention(*held, HEADS, transformer_options={**options(slot.owner(model)), record.KEY: slot.record_of(model)})
    assert slot.record_of(model).as_dict()["ran"] == {"reference": 1}


def test_disabling_the_dense_node_leaves_it_and_it_is_replaced_by_another_of_its_kind():
    model = node(DENSE().execute(Model(), "reference")[0])
    alone = slot.owner(DENSE().execute(model, "disabled")[0])
    assert isinstance(alone, sparse_override.SparseOverride) and alone.previous is None
    again = slot.owner(node(model, selection="sla"))
    assert again.chosen.method == "sla" and again.previous.variant == "reference"


def core_s_override(previous):
    """What ComfyUI's own node puts on top, here one that leaves all calls dense."""

    def override(func, *args, **kwargs):
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)

    override.__module__ = "comfy_extras.nodes_sparse_attention"
    return override


def test_below_the_core_s_own_node_it_is_dense_and_says_so():
    q, k, v = tensors()
    ours = override_of()
    hash(ours)  # the core keeps overrides in a set
    top, core = core_s_override(ours), NewCore()
    out = core.attention(q, k, v, HEADS, transformer_options=options(ours) | {KEY: top})
    assert torch.equal(out, sdpa(q, k, v, HEADS)) and "Model Sparse Attention is on top" in reasons(ours)


def test_it_is_shared_by_clones_and_pickled_with_its_settings():
    model = node(selection="sla")
    assert slot.owner(model.clone()) is slot.owner(model) is copy.deepcopy(slot.owner(model))
    again = pickle.loads(pickle.dumps(slot.owner(model)))
    assert again.chosen == slot.owner(model).chosen and again.record.as_dict()["ran"] == {}


def test_compiled_calls_count_and_do_not_recompile():
    override, graphs = override_of(), []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    def layer(q, k, v):
        return override(sdpa, q + 1, k, v, HEADS, transformer_options=options(override)) * 2

    q, k, v = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend)
    first = compiled(q, k, v)
    after_first = len(graphs)
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), first)
    assert len(graphs) == after_first and counts(override)["ran"] == {"sparse reference": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["mass", "sla", "radial"])
def test_on_this_gpu_it_is_right_and_never_waits_for_it(selection):
    frames, height, width, text = 9, 24, 32, 100
    tokens, dim = frames * height * width + text, 128
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, tokens, 4 * dim, generator=generator).cumsum(1).div(30).cuda().bfloat16() for _ in range(3))
    here = {"selection": selection, "min_tokens": 64, "start_percent": 0.0}
    ours = sparse_override.SparseOverride(sparse_settings.Settings.parse(here))
    exact = sparse_override.SparseOverride(sparse_settings.Settings.parse(here | {"variant": "reference"}))
    given = {"latent": (1, 16, frames, 2 * height, 2 * width), "text": text, "sigmas": torch.tensor([0.5], device="cuda")}
    expected = NewCore().attention(q, k, v, 4, transformer_options=options(exact, **given)).float()
    assert not exact.record.as_dict()["fallbacks"]
    NewCore().attention(q, k, v, 4, transformer_options=options(ours, **given))  # makes the layout, and looks at it
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = NewCore().attention(q, k, v, 4, transformer_options=options(ours, **given))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not ours.record.as_dict()["fallbacks"] and not ours.record.as_dict()["kept"]
    assert float((out.float() - expected).norm() / expected.norm()) < 0.06


@pytest.mark.gpu
def test_shares_on_a_gpu_are_read_a_step_later_without_a_wait():
    shares = part("shares").Shares(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            shares.begin(object())
            shares.note("block 0", torch.full((), 0.9, device="cuda"))
            shares.note("block 1", torch.full((), 0.1, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    shares.begin(object())
    assert shares.crowded.keys() == {"block 0"} and shares.crowded["block 0"] == pytest.approx(0.9)


# Budgets


def test_a_head_that_looks_everywhere_needs_more_than_one_that_looks_at_itself():
    tokens, generator = 1024, torch.Generator().manual_seed(3)
    place = torch.arange(tokens) / tokens * 20
    near = torch.stack([torch.cos(place), torch.sin(place), *torch.zeros(30, tokens)], -1) * 25
    near = near + 0.1 * torch.randn(tokens, 32, generator=generator)
    everywhere = torch.randn(tokens, 32, generator=generator) * 0.1
    q = torch.stack([near, everywhere])[None]
    need = budgets.needs(q, q, None, None)
    assert need[1] > 0.85 and need[0] < 0.35
    shared = budgets.share_out(need, 0.2)
    assert shared[1] > 2 * shared[0] and float(shared.mean()) == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("keep", [0.005, 0.1, 0.5, 0.95])
def test_budgets_stay_in_their_limits_and_add_up(keep):
    need = torch.tensor([0.01, 0.02, 0.1, 0.9, 1.0])
    shared = budgets.share_out(need, keep)
    assert bool((shared <= 1).all() and (shared > 0).all() and (shared.diff() >= -1e-6).all())
    assert float(shared.mean()) == pytest.approx(keep, rel=0.02)


def test_needs_follow_the_order_of_the_blocks_and_groups_of_heads():
    q, k, _ = tensors(heads_kv=2, hnd=True)
    order = block_order.cube_order(*GRID, (2, 8, 4))
    shuffled = budgets.needs(q, k, None, order)
    assert shuffled.shape == (HEADS,) and torch.equal(shuffled, budgets.needs(q, k.repeat_interleave(2, 1), None, order))
    sorted_q, sorted_k = q[:, :, order.long()], k[:, :, order.long()]
    assert not torch.equal(shuffled, budgets.needs(q, k, None, None))
    assert shuffled.sub(budgets.needs(sorted_q, sorted_k, None, None)).abs().max() < 0.25  # other rows are looked at


def test_budget_is_measured_in_the_last_dense_step_of_each_layer(monkeypatch, never_crowded):
    override, seen, looked = override_of(selection="budget", start_percent=0.25), [], []
    monkeypatch.setattr(sparse_override, "sageattn_sparse", lambda *a, **kw: seen.append(kw) or sageattn_sparse(*a, **kw))
    needs = budgets.needs
    monkeypatch.setattr(budgets, "needs", lambda *a: looked.append(a) or needs(*a))
    sampling(override, [1.0, 0.9, 0.8, 0.5, 0.3], layers=2)
    assert len(looked) == 2 and len(seen) == 4  # the step at 0.8 looked, those at 0.5 and 0.3 are sparse
    assert all(kw["selection"] == "topk" and kw["keep"].shape == (HEADS,) for kw in seen)
    assert seen[0]["keep"] is seen[2]["keep"]  # one tensor for all steps, whose values are checked once
    expected = budgets.share_out(needs(*by_heads(*tensors()[:2]), None, block_order.cube_order(*GRID, (2, 8, 4))), 0.1)
    torch.testing.assert_close(seen[0]["keep"], expected)


def test_budget_without_a_dense_step_is_the_same_for_all_heads_and_says_so():
    override = override_of(selection="budget")
    sampling(override, [0.9])
    assert counts(override)["ran"] and any("no dense step" in note for note in override.record.notes)


# VSA


class Attention:
    """H3's: what it reads, and a gate layer."""

    def __init__(self, gate=True):
        self.to_gate_compress = (lambda x: x @ torch.ones(HEADS * DIM, HEADS * DIM) / 50) if gate else None

    def __call__(self, x, rope_freqs=None, transformer_options=None):
        q, k, v = ((x * s).view(-1, HEADS, DIM).transpose(0, 1)[None] for s in (1.0, 0.7, 0.4))
        held = [Container(t) for t in (q, k, v)]
        return NewCore().attention(*held, HEADS, skip_reshape=True, transformer_options=transformer_options)[0]


class H3Model(Model):
    def __init__(self, attention=None, override=None):
        super().__init__(override)
        self.network = SimpleNamespace(blocks=[SimpleNamespace(attn=attention or Attention())])

    def clone(self):
        other = H3Model()
        other.network = self.network
        other.model_options, other.wrappers = copy.deepcopy(self.model_options), copy.deepcopy(self.wrappers)
        return other

    def get_model_object(self, name):
        return self.network if name == "diffusion_model" else super().get_model_object(name)

    def set_model_patch_replace(self, patch, name, block, number):
        self.options.setdefault("patches_replace", {}).setdefault(name, {})[(block, number)] = patch


def run_block(model: H3Model, x: torch.Tensor, **more) -> torch.Tensor:
    """A block as H3 runs it."""
    block = model.network.blocks[0]
    here = {**model.options, "minimax_h3_layout": H3, "block_index": 0, **more}

    def original(args):
        attention = args.get("attention") or block.attn
        return {"img": attention(args["img"], rope_freqs=None, transformer_options=args["transformer_options"])}

    patch = model.options.get("patches_replace", {}).get("dit", {}).get(("double_block", 0))
    args = {"img": x, "transformer_options": here}
    return (original(args) if patch is None else patch(args, {"original_block": original}))["img"]


def test_vsa_runs_in_tiles_with_the_checkpoint_s_gate():
    model = node(H3Model(), selection="vsa", **{"selection.keep_percent": 40.0})
    x = torch.randn(300, HEADS * DIM, generator=torch.Generator().manual_seed(4))
    out = run_block(model, x)
    tiles = block_order.vsa_tiles(*GRID, prefix=(20, 10, 30))
    gate = model.network.blocks[0].attn.to_gate_compress(x)
    q, k, v, gate = ((t.view(-1, HEADS, DIM))[None] for t in (x, x * 0.7, x * 0.4, gate))
    expected = sageattn_sparse(
        *(tiles.pad(t, 1) for t in (q, k, v)), tensor_layout="NHD", selection="topk", keep=0.4, q_block=64, neighbours=-1, tail=False,
        block_len=tiles.block_len, sinks=tiles.prefix_slots, query_sinks=tiles.prefix_slots, coarse_gate=tiles.pad(gate, 1),
        variant="reference",
    )  # fmt: skip
    torch.testing.assert_close(out, tiles.unpad(expected, 1)[0].flatten(1), rtol=0, atol=0)
    assert slot.record_of(model).as_dict()["ran"] == {"sparse reference": 1}


def test_vsa_keeps_another_pack_s_replacement_of_a_block():
    seen = []

    def theirs(args, extra):
        seen.append(args)
        return extra["original_block"](args)

    given = H3Model()
    given.set_model_patch_replace(theirs, "dit", "double_block", 0)
    model = node(node(given, selection="vsa"), selection="vsa")
    run_block(model, torch.randn(300, HEADS * DIM))
    assert len(seen) == 1 and given.options["patches_replace"]["dit"][("double_block", 0)] is theirs


def test_vsa_of_tokens_that_are_not_the_video_s_is_dense(monkeypatch):
    for name, module in NewCore().importable().items():
        monkeypatch.setitem(sys.modules, name, module)
    model = node(H3Model(), selection="vsa")
    run_block(model, torch.randn(290, HEADS * DIM))
    assert "vsa needs the token grid" in "".join(slot.record_of(model).as_dict()["kept"])


@pytest.mark.parametrize(("blocks", "said"), [([], "FastH3"), ([SimpleNamespace(attn=Attention(gate=False))], "no gate layers")])
def test_vsa_is_refused_for_other_models(blocks, said):
    model = H3Model()
    model.network.blocks = blocks
    with pytest.raises(ValueError, match=said):
        node(model, selection="vsa")
