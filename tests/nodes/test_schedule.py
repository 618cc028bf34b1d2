"""Which calls a patch is for: blocks as a user writes them, and steps as ComfyUI's sampler counts them."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Model, OldCore, sample, sdpa  # noqa: E402
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
schedule, slot, patch = PACK.nodes.schedule, PACK.nodes.slot, PACK.nodes.patch
NODE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
Blocks = schedule.Blocks

QKV = [torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize(
    ("text", "numbers", "printed"),
    [
        ("", set(), ""),
        ("  ,; ", set(), ""),
        ("3", {3}, "3"),
        ("0, 1, 47-49", {0, 1, 47, 48, 49}, "0-1, 47-49"),
        ("5 - 7;1 1,6", {1, 5, 6, 7}, "1, 5-7"),
    ],
)
def test_block_lists(text, numbers, printed):
    blocks = Blocks.parse(text)
    assert blocks == numbers and str(blocks) == printed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1, two", "'two'"),
        ("-3", "'-3'"),
        ("9-3", "write 3-9"),
        ("1--3", "'1--3'"),
        ("0-10000000", "10000000"),
        ("1.5", "'1.5'"),
        ("²", "'²'"),
    ],
)
def test_a_block_list_that_can_t_be_read_is_refused_with_a_sentence(text, said):
    with pytest.raises(ValueError, match=said) as refusal:
        Blocks.parse(text)
    assert str(refusal.value).endswith(".")


@given(st.frozensets(st.integers(0, 60)))
def test_a_printed_block_list_reads_back(numbers):
    assert Blocks.parse(str(Blocks(numbers))) == numbers


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent (0.6) is above end_percent (0.4)"),
        ({"start_percent": -0.1}, "start_percent is -0.1"),
        ({"end_percent": float("nan")}, "end_percent is nan"),
        ({"blocks": "0, x"}, "blocks: 'x' is no block"),
        ({"max_error": -1.0}, "max_error is -1"),
        ({"max_error": float("inf")}, "max_error is inf"),
    ],
)
def test_bad_input_is_refused_at_validation_with_a_sentence(inputs, said):
    answer = NODE.VALIDATE_INPUTS(**inputs)
    assert isinstance(answer, str) and said in answer and answer.endswith(".")
    with pytest.raises(ValueError) as refusal:  # what is linked is only known when the node runs
        patch.apply(Model(), "auto", **inputs)
    assert str(refusal.value) == answer
    assert NODE.VALIDATE_INPUTS(**dict.fromkeys(inputs)) is True  # linked: not known yet


def ran_at(model: Model, core: OldCore, block: int | None = None, **keywords) -> list[bool]:
    """Whether ours computed each step's call."""
    ran = []

    def network(options):
        before = sum(slot.record_of(model).ran.values())
        block_index = {} if block is None else {"block_index": block}
        out = core.attention(*QKV, 4, transformer_options={**options, **block_index})
        ran.append(sum(slot.record_of(model).ran.values()) > before)
        return out

    sample(model, network, **keywords)
    return ran


@pytest.mark.parametrize(
    ("start", "end", "ran"),
    [
        (0.0, 1.0, [True, True, True, True]),
        (0.25, 1.0, [False, True, True, True]),  # both ends are inside
        (0.3, 1.0, [False, False, True, True]),
        (0.0, 0.5, [True, True, True, False]),
        (0.5, 0.5, [False, False, True, False]),
        (1.0, 1.0, [False, False, False, False]),
    ],
)
def test_a_window_of_steps(start, end, ran):
    model, core = NODE().execute(Model(), "reference", start, end)[0], OldCore()
    assert ran_at(model, core) == ran  # sigmas 1, .75, .5, .25 are at 0, 25, 50 and 75 %
    kept = slot.record_of(model).kept
    assert len(core.own_calls) == sum(kept.values()) == ran.count(False)
    assert all("outside" in reason for reason in kept)


def test_only_a_window_looks_at_the_sigma(monkeypatch):
    monkeypatch.setattr(PACK.nodes.sampling.Step, "sigma", property(lambda self: pytest.fail("waited for the device")))
    assert ran_at(NODE().execute(Model(), "reference")[0], OldCore()) == [True] * 4


def test_a_window_needs_a_sigma():
    model, core = NODE().execute(Model(), "reference", 0.25)[0], OldCore()
    out = core.attention(*QKV, 4, transformer_options=model.options)
    assert torch.equal(out, sdpa(*QKV, 4))
    assert ["does not tell at which step" in reason for reason in slot.record_of(model).kept] == [True]


@pytest.mark.parametrize(("block", "runs"), [(2, True), (3, False), (None, False)])
def test_a_list_of_blocks(block, runs):
    model = NODE().execute(Model(), "reference", blocks="0-2, 7")[0]
    assert ran_at(model, OldCore(), block) == [runs] * 4
    assert len(slot.record_of(model).kept) == (not runs)


def test_a_list_of_blocks_counts_a_u_net_s_modules():
    model, core = NODE().execute(Model(), "reference", blocks="5")[0], OldCore()
    for module in (4, 5):
        options = {**model.options, "block": ("output", 1), "block_index": 0, "transformer_index": module}
        core.attention(*QKV, 4, transformer_options=options)
    assert slot.record_of(model).ran == {"reference": 1} and len(core.own_calls) == 1


def test_defaults_leave_nothing_to_ask_at_a_call():
    override = slot.owner(NODE().execute(Model(), "reference")[0])
    assert override.schedule is None and override.guard is None and KEY in NODE().execute(Model())[0].options
