"""Whether a call's output may take q's place in memory: who else has it, how its rows lie, what lies between them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from sageattention import torch_internals  # noqa: E402
from sageattention.backends import into_q  # noqa: E402
from sageattention.backends.call import Operands  # noqa: E402
from sageattention.planning.problem import Problem  # noqa: E402

BATCH, HEADS, TOKENS, DIM = 2, 3, 5, 8
Qkv = list[torch.Tensor]


def separate(heads_kv: int = HEADS) -> Qkv:
    """[B, N, H, D], each in memory of its own."""
    return [torch.randn(BATCH, TOKENS, heads, DIM) for heads in (HEADS, heads_kv, heads_kv)]


def fused(heads_kv: int = HEADS) -> Qkv:
    """[B, N, H, D], parts of one projection's result."""
    sizes = [heads * DIM for heads in (HEADS, heads_kv, heads_kv)]
    return [t.unflatten(-1, (-1, DIM)) for t in torch.randn(BATCH, TOKENS, sum(sizes)).split(sizes, -1)]


def taken_over(made: Qkv, layout: str = "NHD", **options) -> bool:
    """Whether a call that is given these, and then is the last to have them, writes into q."""
    problem = Problem.from_tensors(*made, tensor_layout=layout, **{"return_lse": False, **options})
    call = Operands(*made)
    call.take_over(made.clear, problem)
    return call.into_q


TAKEN: dict[str, Callable[[], Qkv]] = {
    "separate": separate, "fused": fused, "fused, with fewer heads of k and v": lambda: fused(1),
    "stacked": lambda: list(torch.randn(3, BATCH, TOKENS, HEADS, DIM).unbind()),
    "stacked by token": lambda: list(torch.randn(BATCH, TOKENS, 3, HEADS, DIM).unbind(2)),
    "one head": lambda: [t[:, :, :1] for t in fused()], "one image": lambda: [t[1:] for t in fused()],
    "a leaf's own": lambda: [torch.nn.Parameter(t, requires_grad=False) for t in separate()],
    "made in inference mode": lambda: torch.inference_mode()(fused)(),
}  # fmt: skip
LEFT: dict[str, Callable[[], Qkv]] = {
    "k is q": lambda: [q := separate()[0], q, torch.randn(q.shape)],
    "v is q, by another name": lambda: [q := separate()[0], torch.randn(q.shape), q.view_as(q)],
    "k is a part of q": lambda: [q := separate()[0], q[:, :, :1], torch.randn(q.shape)[:, :, :1]],
    "heads interleave": lambda: list(torch.randn(BATCH, TOKENS, HEADS, 3, DIM).unbind(3)),
    "heads apart": lambda: [t.transpose(1, 2).contiguous().transpose(1, 2) for t in separate()],
    "images interleave": lambda: [t.transpose(0, 1).contiguous().transpose(0, 1) for t in separate()],
    "every other token": lambda: [t[:, ::2] for t in separate()],  # of two images: their rows are not evenly apart
    "expanded": lambda: [separate()[0][:, :1].expand(-1, TOKENS, -1, -1), *separate()[1:]],
    "of another library": lambda: [torch.from_numpy(t.numpy().copy()) for t in separate()],
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_q_is_written_into(name: str) -> None:
    assert taken_over(TAKEN[name]())


@pytest.mark.parametrize("name", LEFT)
def test_q_is_left_as_it_is(name: str) -> None:
    assert not taken_over(LEFT[name]())


def test_heads_apart_are_dense_rows_of_an_output_by_heads() -> None:
    assert taken_over([t.transpose(1, 2).contiguous() for t in separate()], "HND")
    assert not taken_over([t.transpose(1, 2) for t in separate()], "HND")


def test_a_log_sum_exp_reads_q_again() -> None:
    assert not taken_over(separate(), return_lse=True)


HOLDERS: dict[str, Callable[[Qkv], object]] = {
    "q itself": lambda made: made[0],
    "a view of q": lambda made: made[0][:1],
    "what q is a view of": lambda made: made[0]._base,
    "k, in the same memory": lambda made: made[1],
    "a detached q": lambda made: made[0].detach(),
    "q's storage": lambda made: made[0].untyped_storage(),
    "an array": lambda made: made[0].numpy(),
    "q for a gradient": lambda made: (torch.nn.Parameter(torch.ones(())) * made[0]).grad_fn,
}  # fmt: skip


@pytest.mark.parametrize("name", HOLDERS)
def test_nothing_changes_that_somebody_else_has(name: str) -> None:
    made = fused()
    kept = HOLDERS[name](made)
    assert kept is not None and not taken_over(made)
    del kept, made
    assert taken_over(fused())  # nothing of it stays


def test_a_capture_may_be_replayed_on_the_same_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for a tensor of a GPU."""
    q, k, v = separate()
    problem = Problem.from_tensors(q, k, v, tensor_layout="NHD", return_lse=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        call = Operands(q.clone(), k.clone(), v.clone())
        call.take_over(lambda: None, problem)
        assert call.into_q is not capturing


def elements(t: torch.Tensor) -> set[int]:
    """Addresses."""
    steps = [[i * stride for i in range(size)] for size, stride in zip(t.shape, t.stride())]
    return {t.data_ptr() + t.element_size() * sum(places) for places in itertools.product(*steps)}


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_tensors_that_count_as_apart_have_no_element_in_common(layout: str) -> None:
    """Of many places and strides in one memory; most of those that are apart are found to be."""
    g = torch.Generator().manual_seed(0)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    apart = found = 0
    memory = torch.zeros(4000)
    for _ in range(3000):
        batch, first, second, dim = some(1, 3), some(1, 4), some(1, 4), some(1, 4)
        inner = dim if layout == "HND" else second * dim
        pitch = inner + some(0, 12)
        by_second, by_first = (pitch, second * pitch) if layout == "HND" else (dim, pitch)
        q = memory.as_strided((batch, first, second, dim), (first * by_first, by_first, by_second, 1), some(0, 200))
        assert into_q.row_pitch(q, layout) == pitch
        other_strides = (some(0, 60), pitch * some(1, 3) if some(0, 2) else some(0, 40), some(0, 12), 1)
        other = memory.as_strided((some(1, 3), some(1, 5), some(1, 4), some(1, 4)), other_strides, some(0, 260))
        truly = not elements(q) & elements(other)
        claimed = into_q.apart(q, pitch, other, layout)
        assert truly or not claimed
        apart, found = apart + truly, found + claimed
    assert apart > 500 and found > 0.6 * apart


def test_what_looks_at_a_storage_does_not_count() -> None:
    q = torch.zeros(4)
    assert torch_internals.alone(q) and torch_internals.alone(q)
    other = q.detach()
    assert not torch_internals.alone(q) and torch_internals.alone(q, other)
    del other
    assert torch_internals.alone(q)
