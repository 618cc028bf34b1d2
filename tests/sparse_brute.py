"""Block-sparse attention by its definition, token by token and block by block, in fp64: slow, and written without the package's code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

BLOCK = 64
LOG2E = 1 / math.log(2)


@dataclass
class Call:
    """One call: q [B, Hq, Nq, D], k and v [B, Hkv, Nk, D] and everything that `sparse.route` can be told."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kind: str = "sol"
    tau: float = 1.0
    keep: float = 0.3
    similarity: float = 0.0
    q_block: int = 64
    tail: bool = True
    is_causal: bool = False
    q_start: int | None = 0
    sinks: list = field(default_factory=list)
    query_sinks: list = field(default_factory=list)
    neighbours: int | None = 1
    order: torch.Tensor | None = None
    key_mask: torch.Tensor | None = None
    block_len: torch.Tensor | None = None
    block_mask: torch.Tensor | None = None
    sm_scale: float = 0.25

    def attention(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(out, lse, exact blocks as bool [B, Hq, ⌈Nq/q_block⌉, n])."""
        batch, heads, len_q, _ = self.q.shape
        group = heads // self.k.shape[1]
        out, lse, exact = torch.zeros(self.q.shape).double(), torch.zeros(self.q.shape[:3]).double(), []
        for b in range(batch):
            for h in range(heads):
                one = _Head(self, b, h, self.q[b, h].double(), self.k[b, h // group].double(), self.v[b, h // group].double())
                exact.append(one.exact)
                for row in range(len_q):
                    out[b, h, one.row_at(row)], lse[b, h, one.row_at(row)] = one.attend(row)
        return out, lse, torch.tensor(exact).view(batch, heads, len(exact[0]), -1)


class _Head:
    def __init__(self, call: Call, b: int, h: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor):
        self.call, self.q, self.k, self.v = call, q, k, v
        self.start = call.q_start or 0
        self.n, self.m = math.ceil(len(k) / BLOCK), math.ceil(len(q) / BLOCK)
        self.keys = [[p for p in range(64 * j, min(64 * j + 64, len(k))) if self.lives(b, p)] for j in range(self.n)]
        self.pool(b)
        self.sigma = [[float(self.q_mean[i] @ (self.k_mean[j] - self.mu)) * call.sm_scale * LOG2E if self.keys[j] else 0.0
                       for j in range(self.n)] for i in range(self.m)]  # fmt: skip
        self.visible = [[bool(self.keys[j]) and self.sees(self.last(i), 64 * j) for j in range(self.n)] for i in range(self.m)]
        self.whole = [
            [bool(self.keys[j]) and self.sees(64 * i, min(64 * j + 63, len(k) - 1)) for j in range(self.n)] for i in range(self.m)
        ]
        rows = call.q_block // 64
        self.exact = [
            self.choose(b, h, [i for i in range(rows * x, rows * x + rows) if i < self.m]) for x in range(math.ceil(self.m / rows))
        ]

    def row_at(self, position: int) -> int:
        return position if self.call.order is None else int(self.call.order[position])

    def lives(self, b: int, position: int) -> bool:
        mask, length = self.call.key_mask, self.call.block_len
        if length is not None:
            length = length if length.dim() == 1 else length[b % len(length)]
            if position % 64 >= int(length[position // 64]):
                return False
        return mask is None or bool(mask[b, self.row_at(position)])

    def sees(self, row: int, key: int) -> bool:
        return not self.call.is_causal or key <= row + self.start

    def last(self, i: int) -> int:
        return min(64 * i + 63, len(self.q) - 1)

    def pool(self, b: int) -> None:
        own = [[self.row_at(p) for p in keys] for keys in self.keys]
        self.k_mean = [self.k[rows].mean(0) if rows else None for rows in own]
        means = [mean for mean in self.k_mean if mean is not None]
        self.mu = torch.stack(means).mean(0) if means else torch.zeros_like(self.k[0])
        self.var = torch.stack([(mean - self.mu) ** 2 for mean in means]).mean(0) if means else torch.zeros_like(self.k[0])
        self.v_sum = [self.v[rows].sum(0) for rows in own]
        self.alike = [self.mean_cosine(self.k[rows] - self.mu) for rows in own]
        self.q_mean, self.q_alike = [], []
        for i in range(self.m):
            positions = range(64 * i, self.last(i) + 1)
            if self.call.block_len is not None and self.call.q_start == 0 and len(self.q) == len(self.k):
                lengths = self.call.block_len
                lengths = lengths if lengths.dim() == 1 else lengths[b % len(lengths)]
                positions = [p for p in positions if p % 64 < int(lengths[i])]
            rows = [self.row_at(p) for p in positions]
            self.q_mean.append(self.q[rows].mean(0) if rows else torch.zeros_like(self.q[0]))
            self.q_alike.append(self.mean_cosine(self.q[rows]))

    @staticmethod
    def mean_cosine(x: torch.Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=-1).mean()) if len(x) else 1.0

    def choose(self, b: int, h: int, rows: list[int]) -> list[bool]:
        call = self.call
        seen = [any(self.visible[i][j] for i in rows) for j in range(self.n)]
        sink = [self.holds(call.sinks, 64 * j, min(64 * j + 64, len(self.k))) for j in range(self.n)]
        always = list(sink)
        if self.holds(call.query_sinks, 64 * rows[0], self.last(rows[-1]) + 1):
            always = [True] * self.n
        for i in rows:
            for j in range(self.n):
                if call.neighbours is not None and call.q_start is not None:
                    first, last = (64 * i + self.start) // 64, (self.last(i) + self.start) // 64
                    always[j] |= first - call.neighbours <= j <= last + call.neighbours
                if call.kind != "static" and self.visible[i][j] and not self.whole[i][j]:
                    always[j] = True
        if call.kind == "static":
            mask = call.block_mask[b % len(call.block_mask), h % call.block_mask.shape[1], rows[0] * 64 // call.q_block].tolist()
        else:
            mask = self.score(rows, sink)
        return [(a or s) and v for a, s, v in zip(always, mask, seen)]

    def score(self, rows: list[int], sink: list[bool]) -> list[bool]:
        """Sums of softmaxes against a threshold, in plain numbers."""
        call, weight, limit = self.call, [0.0] * self.n, 0.0
        uneven = [self.alike[j] < call.similarity for j in range(self.n)]
        asked = {i: [j for j in range(self.n) if self.visible[i][j] and not uneven[j] and not sink[j]] for i in rows}
        for i in rows:
            total = sum(2 ** self.sigma[i][j] for j in asked[i])
            for j in asked[i]:
                weight[j] += 2 ** self.sigma[i][j] / total
            if call.kind == "sol" and total:
                spread = sum(float(qd) ** 2 * float(vd) for qd, vd in zip(self.q_mean[i], self.var))
                limit += 2 ** (call.tau * math.sqrt(spread * (call.sm_scale * LOG2E) ** 2 + 1e-6)) / total
            if call.kind == "mass" and asked[i]:
                limit += call.tau / len(asked[i])
        everything = any(self.q_alike[i] < call.similarity for i in rows)
        candidates = sorted({j for i in rows for j in asked[i]}, key=lambda j: -weight[j])
        chosen = set()
        if call.kind in ("sol", "mass"):
            chosen = {j for j in candidates if weight[j] > limit}
        elif call.kind == "topk":
            kappa = round(call.keep * len(candidates))
            if call.keep < 1:
                kappa = min(kappa, len(candidates) - 1)
            chosen = set(candidates[: max(kappa, 1)])
        else:
            share = 0.0
            for j in candidates:
                if share < call.keep:
                    chosen.add(j)
                share += weight[j] / sum(weight)
        return [j in chosen or uneven[j] or everything for j in range(self.n)]

    def holds(self, ranges: list, start: int, stop: int) -> bool:
        return any(a <= self.row_at(p) < z for p in range(start, stop) for a, z in ranges)

    def attend(self, row: int) -> tuple[torch.Tensor, float]:
        """Softmax with one term for each token of an exact block and one for each other block."""
        i, q = row // 64, self.q[self.row_at(row)]
        exact = self.exact[row // self.call.q_block]
        logits, counts, values = [], [], []
        for j in range(self.n):
            if exact[j]:
                for p in self.keys[j]:
                    if self.sees(row, p):
                        logits.append(float(q @ self.k[self.row_at(p)]) * self.call.sm_scale)
                        counts.append(1)
                        values.append(self.v[self.row_at(p)])
            elif self.call.tail and self.whole[i][j]:
                logits.append(self.sigma[i][j] / LOG2E + float(q @ self.mu) * self.call.sm_scale)
                counts.append(len(self.keys[j]))
                values.append(self.v_sum[j] / len(self.keys[j]))
        if not logits:
            return torch.zeros_like(q), -math.inf
        logits = torch.tensor(logits, dtype=torch.float64) + torch.tensor(counts, dtype=torch.float64).log()
        return torch.softmax(logits, 0) @ torch.stack(values), float(torch.logsumexp(logits, 0))
