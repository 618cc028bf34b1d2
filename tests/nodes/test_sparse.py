"""`SageSparseAttention`: which calls it computes sparsely and how, and where it stands among other overrides."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Container, Model, NewCore, OldCore, sdpa  # noqa: E402
from sparse_node import (  # noqa: E402
    BATCH,
    DENSE,
    DIM,
    GRID,
    H3,
    HEADS,
    NODE,
    PACK,
    TOKENS,
    block_order,
    by_heads,
    counts,
    never_crowded,
    node,
    of_package,
    options,
    override_of,
    part,
    reasons,
    record,
    sageattn_sparse,
    sampling,
    slot,
    sparse_override,
    sparse_settings,
    tensors,
)

__all__ = ["never_crowded"]  # a fixture

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


@pytest.mark.parametrize("model_keeps", [False, True])
def test_one_fused_buffer_in_containers_holds_the_output(model_keeps, monkeypatch):
    """On a made-up card, whose kernels are the reference: q is written into where nobody else has it, once the kernels are there."""
    dispatch, steps = of_package("sparse_dispatch"), []

    def run(q, k, v, problem, tensors, plan, into_q):
        steps.append("into q" if into_q else "whole")
        result = dispatch.sparse_reference.run(q, k, v, problem, tensors)
        return result._replace(out=q.copy_(result.out)) if into_q else result

    card = of_package("device.capability").Capability("cuda", 90, 132, "native", "a card")
    monkeypatch.setattr(dispatch, "machine", lambda problem: card)
    monkeypatch.setattr(dispatch.sparse_cuda, "load", lambda problem, plan: steps.append([c.tensor is not None for c in held]))
    monkeypatch.setattr(dispatch.sparse_cuda, "run", run)
    fused = torch.randn(300, 3 * HEADS * DIM, generator=torch.Generator().manual_seed(2))
    held = [Container(t.view(300, HEADS, DIM).transpose(0, 1)[None]) for t in fused.split(HEADS * DIM, -1)]
    q, k, v = (c.tensor.clone() for c in held)
    override, where = override_of(variant="sageattn_qk_int8_pv_fp8_cuda_sm90"), fused.data_ptr()
    given = {KEY: override, "minimax_h3_layout": H3, "block_index": 3}
    kept = fused if model_keeps else None
    del fused
    out = NewCore().attention(*held, HEADS, mask=None, skip_reshape=True, transformer_options=given)
    assert steps == [[True] * 3, "whole" if model_keeps else "into q"] and all(c.tensor is None for c in held)
    assert (out.data_ptr() == where) is not model_keeps
    if kept is not None:
        assert torch.equal(kept[:, : HEADS * DIM], q[0].transpose(0, 1).flatten(1))
    order = block_order.cube_order(*GRID, (2, 8, 4), prefix=60)
    expected = sageattn_sparse(q, k, v, selection="mass", order=order, sinks=60, query_sinks=(30, 60), variant="reference")
    assert torch.equal(out, expected.transpose(1, 2).flatten(2))


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


@pytest.mark.parametrize("hides", [-torch.inf, torch.finfo(torch.float16).min, -1e4])
def test_a_mask_hides_padding_by_any_large_number(hides):
    """Models write their own; and what is smaller adds to scores."""
    bias = torch.zeros(1, 1, 1, 8)
    bias[..., 5:] = hides
    assert sparse_override.key_masks.of_mask(bias).tolist() == [[True] * 5 + [False] * 3]
    bias[..., 5:] = -9e3
    assert "adds to scores" in sparse_override.key_masks.of_mask(bias)


@pytest.mark.gpu
@pytest.mark.parametrize("selection", ["mass", "sla"])
def test_a_long_video_in_containers_peaks_at_q_k_v_and_a_workspace(selection, never_crowded):
    """MiniMax H3's attention, 15 seconds at 768p, twice: the first call makes the layout."""
    frames, height, width, text, heads, dim = 37, 44, 63, 1486, 56, 128
    tokens = frames * height * width + text
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    override = override_of(variant="auto", selection=selection)
    given = options(override, latent=(1, 16, frames, 2 * height, 2 * width), text=text, sigmas=torch.tensor([0.5], device="cuda"))
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        fused = torch.randn(tokens, 3 * heads * dim, device="cuda", dtype=torch.bfloat16)
        held = [Container(t.view(tokens, heads, dim).transpose(0, 1)[None]) for t in fused.split(heads * dim, -1)]
        where = fused.data_ptr()
        del fused
        torch.cuda.reset_peak_memory_stats()
        out = NewCore().attention(*held, heads, skip_reshape=True, transformer_options=given)
        assert out.shape == (1, tokens, heads * dim) and out.data_ptr() == where
        peak = torch.cuda.max_memory_allocated() - before
        del out, held
    assert peak <= 3 * tokens * heads * dim * 2 + (256 << 20)
    assert not counts(override)["fallbacks"] and not counts(override)["kept"]
