"""A call that was checked once is not checked again; anything that a check looks at makes it another call."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from sageattention import Unsupported, problem  # noqa: E402
from sageattention.problem import Problem  # noqa: E402


@pytest.fixture(autouse=True)
def forget():
    problem._checked.clear()
    yield
    problem._checked.clear()


def tensors(**changes):
    shape = {"q": (1, 4, 9, 64), "k": (1, 4, 7, 64), "v": (1, 4, 7, 64)}
    return {name: torch.zeros(changes.get(name, shape[name])) for name in shape}


def test_equal_calls_are_checked_once(monkeypatch):
    first = Problem.from_tensors(**tensors(), sm_scale=0.5)
    monkeypatch.setattr(problem, "_check_kv", None)  # calling it would raise
    assert Problem.from_tensors(**tensors(), sm_scale=0.5) is first
    with pytest.raises(TypeError):
        Problem.from_tensors(**tensors(), sm_scale=0.25)


GOOD = {
    "other length": dict(q=(1, 4, 5, 64)),
    "other heads": dict(k=(1, 2, 7, 64), v=(1, 2, 7, 64)),
}
OPTIONS = {
    "layout": dict(tensor_layout="NHD"),
    "causal": dict(is_causal=True),
    "scale": dict(sm_scale=2),
    "lse": dict(return_lse=True),
    "bool mask": dict(attn_mask=torch.ones(9, 7, dtype=torch.bool)),
    "float mask": dict(attn_mask=torch.ones(9, 7)),
}


def test_different_calls_stay_different():
    shapes = [tensors()] + [tensors(**c) for c in GOOD.values()]
    found = [Problem.from_tensors(**t) for t in shapes]
    square = tensors(q=(1, 4, 4, 64), k=(1, 4, 4, 64), v=(1, 4, 4, 64))
    found += [
        Problem.from_tensors(**square, **({} if "mask" in name else options)) for name, options in OPTIONS.items() if "mask" not in name
    ]
    found += [Problem.from_tensors(**tensors(), **OPTIONS[name]) for name in ("bool mask", "float mask")]
    found.append(Problem.from_tensors(**{n: t.half() for n, t in tensors().items()}))
    assert len(set(found)) == len(found)


BAD = {
    "a strided q": lambda t: t | {"q": torch.zeros(1, 4, 9, 128)[..., ::2]},
    "a strided v": lambda t: t | {"v": torch.zeros(1, 4, 7, 128)[..., ::2]},
    "another dtype": lambda t: t | {"k": t["k"].half()},
    "another device": lambda t: t | {"v": t["v"].to("meta")},
    "another length": lambda t: t | {"v": torch.zeros(1, 4, 8, 64)},
    "no tensor": lambda t: t | {"q": None},
    "no dimensions": lambda t: t | {"k": torch.zeros(())},
    "an integer": lambda t: {n: x.int() for n, x in t.items()},
    "a mask that does not fit": lambda t: t | {"attn_mask": torch.ones(9, 6)},
    "a mask of integers": lambda t: t | {"attn_mask": torch.ones(9, 7, dtype=torch.int32)},
    "a mask elsewhere": lambda t: t | {"attn_mask": torch.ones(9, 7, device="meta")},
    "an unknown layout": lambda t: t | {"tensor_layout": "NDH"},
    "a layout of another type": lambda t: t | {"tensor_layout": ["HND"]},
    "an infinite scale": lambda t: t | {"sm_scale": float("inf")},
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_refused_every_time_also_after_a_good_one(name):
    Problem.from_tensors(**tensors())
    Problem.from_tensors(**tensors(), attn_mask=torch.ones(9, 7))
    for _ in range(2):
        with pytest.raises(Unsupported):
            Problem.from_tensors(**BAD[name](tensors()))


def test_a_scale_in_a_tensor_is_read_at_every_call():
    scale = torch.tensor(0.5)
    assert Problem.from_tensors(**tensors(), sm_scale=scale).sm_scale == 0.5
    scale.fill_(0.25)
    assert Problem.from_tensors(**tensors(), sm_scale=scale).sm_scale == 0.25


def test_the_memory_does_not_grow_without_end(monkeypatch):
    for n in range(1, 4200):
        Problem.from_tensors(**tensors(), sm_scale=float(n))
    assert len(problem._checked) <= 4096
