"""Groups of heads alternate between two streams: what orders them, on streams that only record what they are told to wait for."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from sageattention.backends.cuda import driver, host  # noqa: E402

OWN, SIDE = 11, 22


class Stream:
    """A stream by what is certain to be done before its next launch."""

    def __init__(self, number: int, done: set[str]):
        self.cuda_stream, self.done = number, done

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, Stream]:
    """The caller's stream, on which `before` was launched, and the second one; launches add themselves to their stream."""
    found = {OWN: Stream(OWN, {"before"}), SIDE: Stream(SIDE, set())}

    def launch(device: int, stream: int, chain: tuple[str, ...]) -> None:
        assert "before" in found[stream].done, "the tensors may not be there yet"
        found[stream].done.update(chain)

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: OWN, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: found[OWN])
    monkeypatch.setattr(host, "_side_stream", lambda device: found[SIDE])
    return found


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
def test_whatever_follows_on_the_callers_stream_follows_every_group(streams: dict[int, Stream], groups: int) -> None:
    chains = [(f"quantize {n}", f"attend {n}") for n in range(groups)]
    host.issue(0, chains)
    assert streams[OWN].done == {"before", *(launch for chain in chains for launch in chain)}
    assert ("attend 1" in streams[SIDE].done) == (groups > 1)  # two groups do run beside each other


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_a_mask_is_classified_before_any_group_begins(streams, groups, monkeypatch):
    t, launched = torch.zeros(4), driver.launch
    names = [f"group {number}" for number in range(groups)]

    def launch(device: int, stream: int, chain: tuple[str, ...]) -> None:
        known = {"before", *streams[stream].done, *chain[:-1]}
        assert chain[-1] not in names or "classify" in known
        launched(device, stream, chain)

    monkeypatch.setattr(driver, "launch", launch)
    monkeypatch.setattr(host, "result_like", lambda q, problem: (q, None))
    monkeypatch.setattr(host, "chains", lambda *arguments: [(name,) for name in names])
    monkeypatch.setattr(host, "_classify_launch", lambda *arguments: "classify")
    form = SimpleNamespace(
        launch_plan=SimpleNamespace(device=0), lists=SimpleNamespace(size=0, at=lambda address: host.Extra()), size=0
    )  # fmt: skip
    unaligned = t.data_ptr() % 16
    host.run(SimpleNamespace(q=t, k=t, v=t, mask=t, problem=None, bound={(unaligned,) * 3: form}))
    assert {"classify", *names} <= streams[OWN].done
