"""`SparseProblem`: one block-sparse call, checked, as plain data beside its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import Unsupported
from ..numerics.block_selection import KINDS
from ..numerics.pooling import BLOCK, count_blocks
from .problem import Problem, as_flag, check_plain
from .tensor_values import once

Ranges = tuple[tuple[int, int], ...]
Q_BLOCKS = (64, 128)
# The threshold that each selection takes, and its default.
TAU = {"sol": 1.3, "mass": 2.0}
KEEP = {"topk": 0.1, "cdf": 0.7}


class SparseTensors(NamedTuple):
    """Tensors of a call beside q, k and v; None where there is none. Shapes are those of `sageattn_sparse`."""

    tau: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    order: torch.Tensor | None = None
    block_len: torch.Tensor | None = None
    block_mask: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    coarse_gate: torch.Tensor | None = None


class SparseProblem(NamedTuple):
    """What is asked, without the tensors.

    Attributes:
        problem: the attention call as a dense one.
        tau, keep: the threshold, 0 where the selection takes none or a tensor holds one for each head.
        neighbours, q_start: as in `numerics.sparse_geometry.Geometry`.
        sinks, query_sinks: token ranges, half-open, none of them empty.
        given: names of the fields of `SparseTensors` that hold one.
    """

    problem: Problem
    selection: str
    tau: float
    keep: float
    similarity: float
    q_block: int
    tail: bool
    neighbours: int | None
    q_start: int | None
    sinks: Ranges
    query_sinks: Ranges
    given: tuple[str, ...]

    @property
    def all_exact(self) -> bool:
        """Whether every block is exact whatever q and k hold, which makes the call dense attention over the keys of `key_mask`."""
        p = self.problem
        by_rule = self.selection == "topk" and self.keep == 1.0  # a tensor of shares says 0 here
        return "block_len" not in self.given and (by_rule or (0, p.len_kv) in self.sinks or (0, p.len_q) in self.query_sinks)

    @classmethod
    def from_call(
        cls,
        problem: Problem,
        q: torch.Tensor,
        *,
        selection: str = "sol",
        tau: float | torch.Tensor | None = None,
        keep: float | torch.Tensor | None = None,
        similarity: float = 0.0,
        q_block: int = 128,
        tail: bool = True,
        neighbours: int | None = None,
        q_start: int | None = None,
        sinks: int | Sequence = (),
        query_sinks: int | Sequence = (),
        order: torch.Tensor | None = None,
        block_len: torch.Tensor | None = None,
        block_mask: torch.Tensor | None = None,
        key_mask: torch.Tensor | None = None,
        coarse_gate: torch.Tensor | None = None,
    ) -> tuple[SparseProblem, SparseTensors]:
        """Check what a block-sparse call has beyond a dense one; the defaults are those of `sageattn_sparse`.

        Raises:
            Unsupported: an argument that makes no sense; it names the argument, what was given, what is accepted.
        """
        p = problem
        if p.beyond_variants is not None:
            raise p.beyond_variants
        if p.needs_grad:
            raise Unsupported("q", "a gradient is asked for; block-sparse attention has none (under torch.no_grad() it runs)")
        if selection not in KINDS:
            raise Unsupported("selection", f"got {selection!r}, accepted are {', '.join(map(repr, KINDS))}")
        if q_block not in Q_BLOCKS:
            raise Unsupported("q_block", f"got {q_block!r}, accepted are 64 and 128")
        tensors = SparseTensors(
            tau if isinstance(tau, torch.Tensor) else None, keep if isinstance(keep, torch.Tensor) else None,
            order, block_len, block_mask, key_mask, coarse_gate,
        )  # fmt: skip
        if q_start is None and p.len_q == p.len_kv:
            q_start = 0
        sparse = cls(
            p,
            selection,
            _threshold("tau", tau, selection, TAU, p, q, -math.inf if selection == "sol" else 0.0, math.inf),
            _threshold("keep", keep, selection, KEEP, p, q, 0.0, 1.0),
            _similarity(similarity, selection),
            q_block,
            as_flag("tail", tail),
            _neighbours(neighbours, selection),
            None if q_start is None else _count("q_start", q_start),
            _within("sinks", token_ranges("sinks", sinks), p.len_kv),
            _within("query_sinks", token_ranges("query_sinks", query_sinks), p.len_q),
            tuple(name for name, t in zip(SparseTensors._fields, tensors) if t is not None),
        )
        sparse._check_tensors(q, tensors)
        return sparse, tensors

    def _check_tensors(self, q: torch.Tensor, tensors: SparseTensors) -> None:
        p = self.problem
        blocks, lists = count_blocks(p.len_kv), count_blocks(p.len_q, self.q_block)
        if tensors.order is not None:
            _check("order", tensors.order, q, torch.int32, [(p.len_kv,)], "[N], a permutation of the rows")
            if p.len_q != p.len_kv or self.q_start:
                lengths = f"q has {p.len_q} tokens from {self.q_start or 0} on, k has {p.len_kv}"
                raise Unsupported("order", f"is one for queries and keys, which have to be the same tokens; {lengths}")
            if p.causal:
                raise Unsupported("order", "has no causal form: pass order=None or is_causal=False")
            if once(tensors.order, _is_permutation) is False:
                raise Unsupported("order", f"holds a row twice or none of 0 to {p.len_kv - 1}; accepted is a permutation")
        if tensors.block_len is not None:
            shapes = [(blocks,), (1, blocks), (p.batch, blocks)]
            _check("block_len", tensors.block_len, q, torch.int32, shapes, "[ceil(Nk/64)] or [B, ceil(Nk/64)]")
            _check_values("block_len", tensors.block_len, 0, BLOCK)
        if (tensors.block_mask is not None) != (self.selection == "static"):
            raise Unsupported("block_mask", f"selection {self.selection!r}: only 'static' takes a block mask, and needs one")
        if tensors.block_mask is not None:
            shapes = [(b, h, lists, blocks) for b in (1, p.batch) for h in (1, p.heads_q)]
            shape = f"[B or 1, Hq or 1, ceil(Nq/{self.q_block}), ceil(Nk/64)]"
            _check("block_mask", tensors.block_mask, q, torch.bool, shapes, shape)
        if tensors.key_mask is not None:
            _check("key_mask", tensors.key_mask, q, torch.bool, [(p.batch, p.len_kv)], "[B, Nk], True where the key exists")
        if tensors.coarse_gate is not None:
            _check("coarse_gate", tensors.coarse_gate, q, q.dtype, [tuple(q.shape)], "q's")
            if p.causal:
                raise Unsupported("coarse_gate", "has no causal form: pass coarse_gate=None or is_causal=False")


def _threshold(
    name: str, given: float | torch.Tensor | None, selection: str, defaults: dict[str, float], p: Problem, q: torch.Tensor,
    low: float, high: float,
) -> float:  # fmt: skip
    """The number, or 0 where a tensor holds the numbers."""
    if selection not in defaults:
        if given is not None:
            takers = " and ".join(map(repr, defaults))
            raise Unsupported(name, f"is given, and selection {selection!r} takes none; {takers} do")
        return 0.0
    if not isinstance(given, torch.Tensor):
        return _number(name, defaults[selection] if given is None else given, low, high)
    _check(name, given, q, torch.float32, [(p.heads_q,)], "[Hq], one for each head")
    _check_values(name, given, low, high)
    return 0.0


def _check(name: str, given: torch.Tensor, q: torch.Tensor, dtype: torch.dtype, shapes: list[tuple[int, ...]], shape: str) -> None:
    if not isinstance(given, torch.Tensor):
        raise Unsupported(name, f"got {type(given).__name__}, accepted is a torch.Tensor of {dtype}, {shape}")
    check_plain(name, given)
    if given.dtype != dtype:
        raise Unsupported(name, f"its dtype is {given.dtype}, accepted is {dtype}")
    if tuple(given.shape) not in shapes:
        accepted = " or ".join(str(list(s)) for s in dict.fromkeys(shapes))
        raise Unsupported(name, f"its shape is {list(given.shape)}, accepted is {accepted}: {shape}")
    if given.device != q.device:
        raise Unsupported(name, f"is on {given.device}, q is on {q.device}; they must be on one device")


def _check_values(name: str, given: torch.Tensor, low: float, high: float) -> None:
    found = once(given, _extremes)
    if found is not None and not (low <= found[0] and found[1] <= high and all(map(math.isfinite, found))):
        raise Unsupported(name, f"holds values from {found[0]} to {found[1]}, accepted are {_span(low, high)}")


def _extremes(given: torch.Tensor) -> tuple[float, float]:
    low, high = given.aminmax() if given.numel() else (given.new_zeros(()),) * 2
    return low.item(), high.item()


def _is_permutation(order: torch.Tensor) -> bool:
    return bool((order.sort().values == torch.arange(order.numel(), device=order.device)).all())


def _number(name: str, given: float, low: float, high: float) -> float:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not (low <= given <= high) or not math.isfinite(given):
        raise Unsupported(name, f"got {given!r}, accepted are {_span(low, high)}")
    return float(given)


def _span(low: float, high: float) -> str:
    if math.isinf(low):
        return "finite numbers"
    return f"finite numbers >= {low:g}" if math.isinf(high) else f"numbers from {low:g} to {high:g}"


def _count(name: str, given: int) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__") or given < 0:
        raise Unsupported(name, f"got {given!r}, accepted is an integer >= 0")
    return int(given)


def _similarity(given: float, selection: str) -> float:
    if selection == "static" and given:
        raise Unsupported("similarity", f"got {given!r}, and selection 'static' looks at no token; accepted is 0")
    return _number("similarity", given, -1.0, 1.0)


def _neighbours(given: int | None, selection: str) -> int | None:
    """Blocks on either side, None for no such rule: 1 by default, and none beside a given mask."""
    if given is None:
        return None if selection == "static" else 1
    if given == -1:
        return None
    return _count("neighbours", given)


def token_ranges(name: str, given: int | Sequence) -> Ranges:
    """Half-open ranges from a number of tokens at the beginning, (start, stop), or a sequence of such pairs.

    Raises:
        Unsupported: anything else.
    """
    pairs = [(0, given)] if hasattr(given, "__index__") else [given] if _is_pair(given) else given
    try:
        return tuple((start.__index__(), stop.__index__()) for start, stop in pairs)
    except (TypeError, ValueError, AttributeError):
        accepted = "accepted are a number of tokens, (start, stop), or a sequence of such pairs"
        raise Unsupported(name, f"got {given!r}, {accepted}") from None


def _is_pair(given: object) -> bool:
    return isinstance(given, Sequence) and len(given) == 2 and all(hasattr(x, "__index__") for x in given)


def _within(name: str, ranges: Ranges, tokens: int) -> Ranges:
    """The ranges that are not empty."""
    for start, stop in ranges:
        if not 0 <= start <= stop <= tokens:
            raise Unsupported(name, f"got ({start}, {stop}), accepted are ranges within the sequence's {tokens} tokens")
    return tuple((start, stop) for start, stop in ranges if start < stop)
