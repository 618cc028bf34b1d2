"""`SageSparseAttention`'s methods that look at a model: budgets of heads, and VSA with a checkpoint's gate."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import Container, Model, NewCore  # noqa: E402
from sparse_node import (  # noqa: E402
    DIM,
    GRID,
    H3,
    HEADS,
    PACK,
    block_order,
    budgets,
    by_heads,
    counts,
    never_crowded,
    node,
    override_of,
    sageattn_sparse,
    sampling,
    slot,
    sparse_override,
    tensors,
)

__all__ = ["never_crowded"]  # a fixture

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


def test_a_program_under_autocast_changes_no_need():
    q, k, _ = by_heads(*tensors())
    need = budgets.needs(q, k, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(budgets.needs(q, k, None, None), need)


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


def test_a_budget_is_that_of_its_length_and_its_device():
    """Another resolution's says nothing; and a tensor on another device than the call would be refused."""
    known, options = budgets.Budgets(), {"cond_or_uncond": [0]}
    q, k, _ = tensors(hnd=True)
    known.measure("block 0", options, q, k, None, None)
    assert known.of("block 0", options, q, 0.1).shape == (HEADS,)
    assert known.of("block 0", options, q[:, :, :-1], 0.1) is None
    assert known.of("block 0", options, q.to("meta"), 0.1) is None
    assert known.of("block 0", {"cond_or_uncond": [1]}, q, 0.1) is None


def test_a_layer_s_passes_have_budgets_of_their_own_and_a_new_look_replaces_the_last():
    q, k, _ = tensors(heads_kv=2, hnd=True)
    peaked = q * torch.linspace(1, 6, HEADS)[:, None, None]
    held, conditional, unconditional = budgets.Budgets(), {"cond_or_uncond": [0]}, {"cond_or_uncond": [1]}

    def expected(queries):
        return budgets.share_out(budgets.needs(queries, k, None, None), 0.2)

    assert not torch.allclose(expected(q), expected(peaked), atol=0.01)
    held.measure("block 0", conditional, peaked, k, None, None)
    held.measure("block 0", unconditional, q, k, None, None)
    torch.testing.assert_close(held.of("block 0", conditional, q, 0.2), expected(peaked))
    torch.testing.assert_close(held.of("block 0", unconditional, q, 0.2), expected(q))
    assert held.of("block 1", conditional, q, 0.2) is None
    held.measure("block 0", conditional, q, k, None, None)
    torch.testing.assert_close(held.of("block 0", conditional, q, 0.2), expected(q))


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


def run_block(model: H3Model, x: torch.Tensor, attention=None) -> torch.Tensor:
    """A block as H3 runs it, or as it does with an attention that another replacement has put in."""
    block = model.network.blocks[0]
    here = {**model.options, "minimax_h3_layout": H3, "block_index": 0}

    def original(args):
        attention = args.get("attention") or block.attn
        return {"img": attention(args["img"], rope_freqs=None, transformer_options=args["transformer_options"])}

    patch = model.options.get("patches_replace", {}).get("dit", {}).get(("double_block", 0))
    args = {"img": x, "transformer_options": here, **({"attention": attention} if attention else {})}
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
    assert model.options["patches_replace"]["dit"][("double_block", 0)].below is theirs  # once, not again for the second node


def test_vsa_keeps_an_attention_that_another_pack_gives_a_block():
    model, gates = node(H3Model(), selection="vsa"), []
    own = model.network.blocks[0].attn

    def theirs(x, *, transformer_options, **others):
        gates.append(transformer_options[PACK.nodes.vsa.GATE]())
        return own(x, transformer_options=transformer_options, **others) * 2

    x = torch.randn(300, HEADS * DIM)
    expected = run_block(model, x) * 2
    torch.testing.assert_close(run_block(model, x, attention=theirs), expected)
    torch.testing.assert_close(gates, [own.to_gate_compress(x)])


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
