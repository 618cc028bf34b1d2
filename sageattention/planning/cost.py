"""What attention calls take, as sums: a call is so much `Work`, and each way to compute it has a `Cost` for every unit of that.

Costs are fitted to times that were measured (`fit`), or follow from a data sheet (planning/datasheet.py). They are kept by the compiled
head dimension and the kind of mask, so that a sum does for everything else: a fixed part, waves of blocks, work at a rate, and bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from ..numerics.constants import HEAD_DIMS, pad_head_dim
from ..variants import SDPA, Candidate
from .problem import Problem

# Kinds of masks that take different time: one row for all queries, and masks that tell queries apart, as torch knows them.
MASKS = ("none", "causal", "keys", "bool", "additive")
TORCH = Candidate(SDPA.name)
# What a candidate's kernels for a call are, where its mask alone doesn't tell (planning/ways.py): K and V stay in shared memory; PyTorch's
# masked attention where rows of the mask are aligned to four bytes, and where they are not, which is another backend of its.
RESIDENT, ALIGNED, UNALIGNED = "resident", "aligned", "unaligned"
BLOCK = 128  # queries that a block of an attention kernel takes, and keys that PyTorch's take at a time
MI = 1 << 20
# Bytes of quantised K and V that a CUDA variant keeps at once: the rest of its 128 MiB are statistics.
WORKSPACE_LIMIT, GROUPS_ALIVE = 126 << 20, 2  # a group of heads is quantised while another one is attended
TORCH_WIDE = 192  # channels beyond which torch's kernels are others


class Form(NamedTuple):
    """What of a call its time depends on.

    Attributes:
        heads, heads_kv: over all batches.
        mask: of `MASKS`.
        mask_rows: rows of the mask that differ, over batches, heads and queries.
        itemsize: bytes of an element of q, k and v.
    """

    heads: int
    heads_kv: int
    len_q: int
    len_kv: int
    head_dim: int
    mask: str = "none"
    mask_rows: int = 1
    itemsize: int = 2

    @classmethod
    def of(cls, problem: Problem) -> Form:
        """Of a call."""
        mask, batch = problem.mask_kind, problem.batch
        if mask == "list":
            mask = "keys" if problem.mask_shape[2] == 1 and not problem.causal else problem.mask
        return cls(
            batch * problem.heads_q, batch * problem.heads_kv, problem.len_q, problem.len_kv, problem.head_dim, mask,
            math.prod(problem.mask_shape), 4 if problem.dtype == "float32" else 2,
        )  # fmt: skip

    @property
    def kind(self) -> Kind:
        return pad_head_dim(self.head_dim), self.mask

    @property
    def keys_of_a_query(self) -> float:
        """How many keys a query sees, on average: of a causal call its own and those before it."""
        if self.mask != "causal" or not self.len_q:
            return self.len_kv
        cut = min(self.len_q, self.len_kv)  # queries that don't see all keys
        return (cut * (cut + 1) / 2 + (self.len_q - cut) * self.len_kv) / self.len_q

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.heads} heads, {self.len_q:,} queries, {self.len_kv:,} keys, mask {self.mask}"


Kind = tuple[int, str]  # the compiled head dimension, and the mask; of a candidate's kernels, what stands for it
KINDS: tuple[Kind, ...] = tuple((head_dim, mask) for head_dim in HEAD_DIMS for mask in MASKS)


class Way(NamedTuple):
    """Kernels by which a candidate computes a call.

    Attributes:
        kind: calls of one kind have the same costs for each unit of work.
        block, tile: queries and keys that a block takes at a time.
        kv_bytes: that are kept of a key and a head, quantised; 0 where nothing is.
        torch: they are PyTorch's.
    """

    kind: Kind
    block: int = BLOCK
    tile: int = BLOCK
    kv_bytes: int = 0
    torch: bool = False


class Work(NamedTuple):
    """How much of each a call is."""

    call: float = 1.0
    waves: float = 0.0  # of blocks over the multiprocessors, the last one counted as whole
    wave_keys: float = 0.0  # waves times thousands of keys: how long the multiprocessors are busy
    idle_keys: float = 0.0  # thousands of keys, times the share of multiprocessors that have no block at all
    blocks: float = 0.0  # for each multiprocessor: waves, if the last one were not whole
    padded: float = 0.0  # blocks of a call whose head dimension is padded
    pairs: float = 0.0  # millions of queries times keys, for each multiprocessor: busy time, likewise
    products: float = 0.0  # pairs times 64 channels
    grouped: float = 0.0  # wave_keys more where K and V exceed the workspace: heads are computed group by group, each in waves of its own
    query: float = 0.0  # millions of elements of q, 16 bits each
    key: float = 0.0  # millions of elements of k, likewise
    mask: float = 0.0  # MB of the mask
    converted: float = 0.0  # bool masks that are made additive ones first, as torch does
    converted_mask: float = 0.0  # MB of those
    wide: float = 0.0  # wave_keys of more than 192 channels, where torch's kernels are others


class Cost(Work):
    """Microseconds for each unit of `Work`, in its order."""

    __slots__ = ()

    def ms(self, work: Work) -> float:
        """The time of a call."""
        return sum(map(mul, self, work)) / 1e3


Costs = dict[Kind, dict[Candidate, Cost]]  # torch's attention among the candidates


def work_of(form: Form, way: Way, multiprocessors: int) -> Work:
    """What a call is on a card."""
    head_dim, mask = form.kind
    causal = mask == "causal"
    keys = form.keys_of_a_query if causal else -(-form.len_kv // way.tile) * way.tile  # a tile that is not full takes as long
    blocks_of_head = -(-form.len_q // way.block)
    blocks = form.heads * blocks_of_head / multiprocessors
    waves, pairs = float(math.ceil(blocks)), blocks * way.block * keys / MI
    longest = min(form.len_q, form.len_kv) if causal else keys  # of a block: a single wave takes as long as that
    masked, elements = mask not in ("none", "causal"), form.head_dim * form.itemsize / 2 / MI
    mask_bytes = form.mask_rows * form.len_kv * (form.itemsize if mask == "additive" else 1) if masked else 0
    wave_keys, converted = max(waves * keys, longest) / 1024, float(way.torch and mask == "bool")
    parts = [heads * blocks_of_head / multiprocessors for heads in _heads_in_parts(form, way)]
    return Work(
        waves=waves,
        wave_keys=wave_keys,
        idle_keys=sum(max(0.0, 1 - part) for part in parts) * keys / 1024,
        blocks=blocks,
        padded=blocks if form.head_dim < head_dim else 0.0,
        pairs=pairs,
        products=pairs * form.head_dim / 64,
        grouped=max(0.0, sum(map(math.ceil, parts)) - waves) * keys / 1024,
        query=form.heads * form.len_q * elements,
        key=form.heads_kv * form.len_kv * elements,
        mask=mask_bytes / MI,
        converted=converted,
        converted_mask=converted * mask_bytes / MI,
        wide=wave_keys if way.torch and form.head_dim > TORCH_WIDE else 0.0,
    )


def _heads_in_parts(form: Form, way: Way) -> list[int]:
    """Heads that are attended at once: all, or those of as many groups as the workspace holds (`KernelPlan.grouped`)."""
    per_head = form.len_kv * way.kv_bytes
    if form.heads_kv * per_head <= WORKSPACE_LIMIT:
        return [form.heads]
    groups = -(-form.heads_kv // max(1, WORKSPACE_LIMIT // (GROUPS_ALIVE * per_head)))
    at_once = GROUPS_ALIVE * -(-form.heads_kv // groups)
    heads = form.heads // form.heads_kv
    return [heads * min(at_once, form.heads_kv - first) for first in range(0, form.heads_kv, at_once)]


# How strongly a cost is drawn to the prior one: to be off from it by all of that weighs as much as to be off from one time by 14 %. By
# ten-fold cross-validation on an H200 the best, with a tenth and with five times of it nearly as good.
RIDGE = 0.02
SWEEPS = 300


def fit(timed: Sequence[tuple[Work, float, float]], prior: Cost) -> Cost:
    """The costs, none negative, that give (work, ms, weight) of calls with the least squares of relative errors, drawn to `prior`.

    One time scales the prior as a whole, many replace it. What costs nothing by the prior is no part of what a candidate does.
    """
    if not timed:
        return prior
    rows = [[amount / (1e3 * ms) for amount in work] for work, ms, _ in timed]  # times the costs: predicted over measured
    weighted = [(row, weight) for row, (*_, weight) in zip(rows, timed)]
    ratios = sorted(1 / sum(a * c for a, c in zip(row, prior)) for row in rows)
    scale = ratios[len(ratios) // 2]
    costs = [scale * c for c in prior]
    count = [i for i, c in enumerate(costs) if c]
    gram = {i: [sum(weight * row[i] * row[j] for row, weight in weighted) for j in range(len(costs))] for i in count}
    given = {i: sum(weight * row[i] for row, weight in weighted) for i in count}
    pull = {i: (RIDGE / costs[i] ** 2, costs[i]) for i in count}
    for _ in range(SWEEPS):  # coordinate descent: each in turn is put where the error is least
        for i in count:
            strength, towards = pull[i]
            others = sum(gram[i][j] * costs[j] for j in count if j != i)
            costs[i] = max(0.0, (given[i] - others + strength * towards) / (gram[i][i] + strength))
    return Cost(*costs)
