"""How q, k and v of a ComfyUI attention call are viewed as [B, heads, L, D] or [B, L, heads, D], and the result given back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..sageattention import Unsupported


class Form(NamedTuple):
    """Calls alike in all that decides how they are computed: how q, k and v are viewed.

    Attributes:
        views: the shapes, [B, L, heads, D], of q, k and v that come as [B, L, heads·D]; None where they come as [B, heads, L, D].
        transposed: heads and tokens change places. Views of the inputs cost nothing, where a copy of the output would.
        layout: the output's, "HND" with `skip_output_reshape`, else "NHD".
    """

    views: tuple[tuple[int, ...], ...] | None
    transposed: bool
    layout: str

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int | None, skip_reshape: bool, skip_output_reshape: bool,
        enable_gqa: bool,
    ) -> Form:  # fmt: skip
        """The form of a call.

        Raises:
            Unsupported: its shapes do not fit each other.
        """
        if heads is None:
            raise Unsupported("heads", "the call does not say how many there are")
        views = (_check_heads if skip_reshape else _split_heads)(q, k, v, heads, enable_gqa)
        return cls(views, bool(skip_reshape) != bool(skip_output_reshape), "HND" if skip_output_reshape else "NHD")

    def view(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v in `layout`."""
        if self.views is not None:
            of_q, of_k, of_v = self.views
            q, k, v = q.view(*of_q), k.view(*of_k), v.view(*of_v)  # a third cheaper than with a tuple
        if self.transposed:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return q, k, v

    def give_back(self, out: torch.Tensor) -> torch.Tensor:
        """A result in `layout` as the model wants it."""
        return out if self.layout == "HND" else out.flatten(2)


def _split_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool) -> tuple[tuple[int, ...], ...]:
    """How [B, L, heads·D] is viewed as [B, L, heads, D]; k and v have fewer heads where `enable_gqa` says so."""
    _check_rank(3, "[B, L, heads*D]", q, k, v)
    inner = q.shape[2]
    if heads < 1 or inner < 1 or inner % heads:
        raise Unsupported("heads", f"got {heads}, accepted is a divisor of q's last dimension, {inner}")
    dim = inner // heads
    for name, t in (("k", k), ("v", v)):
        if (t.shape[2] != inner and not enable_gqa) or t.shape[2] % dim:
            accepted = f"a multiple of {dim}" if enable_gqa else f"q's, {inner} (fewer heads only with enable_gqa)"
            raise Unsupported(name, f"its last dimension is {t.shape[2]}, accepted is {accepted}")
    return tuple((*t.shape[:2], t.shape[2] // dim, dim) for t in (q, k, v))


def _check_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, enable_gqa: bool) -> tuple[tuple[int, ...], ...] | None:
    """[B, heads, L, D] is taken as it is."""
    _check_rank(4, "[B, heads, L, D]", q, k, v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.shape[1] != heads and (name == "q" or not enable_gqa):
            raise Unsupported(name, f"it has {t.shape[1]} heads, the call says {heads}; only k and v may differ, with enable_gqa")
    return None


def _check_rank(rank: int, shape: str, *tensors: torch.Tensor) -> None:
    for name, t in zip("qkv", tensors):
        if t.dim() != rank:
            raise Unsupported(name, f"got {t.dim()} dimensions {tuple(t.shape)}, accepted are {rank}, {shape}")


def four_dimensional(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[Lq, Lk] holds for every batch and head, [B, Lq, Lk] for every head."""
    if mask is None or mask.dim() == 4:
        return mask
    return mask[:, None] if mask.dim() == 3 else mask
