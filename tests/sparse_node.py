"""`SageSparseAttention` for its tests: the pack's parts, a small video's calls, and a sampler that makes them."""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from comfy_standin import KEY, Model, NewCore  # noqa: E402
from pack import load_pack  # noqa: E402

PACK = load_pack()
NODE = PACK.NODE_CLASS_MAPPINGS["SageSparseAttention"]
DENSE = PACK.NODE_CLASS_MAPPINGS["PatchSageAttention"]
slot, forward, record = PACK.nodes.slot, PACK.nodes.forward, PACK.nodes.record


def part(name: str) -> ModuleType:
    return importlib.import_module(f"{PACK.__name__}.nodes.{name}")


sparse_override, sparse_settings, grid, budgets, vsa = map(part, ("sparse_override", "sparse_settings", "grid", "budgets", "vsa"))
sageattn_sparse = PACK.sageattention.sageattn_sparse


def of_package(name: str) -> ModuleType:
    """A module of the pack's own copy of the package."""
    return importlib.import_module(f"{PACK.sageattention.__name__}.{name}")


block_order = of_package("block_order")

BATCH, HEADS, DIM = 2, 4, 32
GRID = (3, 8, 10)  # tokens
TOKENS = 240
LATENT = (BATCH, 16, 3, 16, 20)
PATCH = (1, 2, 2)
HERE = {"variant": "reference", "min_tokens": 64, "start_percent": 0.0}


def tensors(tokens: int = TOKENS, heads_kv: int = HEADS, hnd: bool = False, batch: int = BATCH) -> list[torch.Tensor]:
    """Smooth along the tokens, so that blocks differ in what they matter."""
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(batch, heads, tokens, DIM, generator=generator).cumsum(2) / 4 for heads in (HEADS, heads_kv, heads_kv)]
    return made if hnd else [t.transpose(1, 2).flatten(2) for t in made]


def options(override, latent=LATENT, patch=PATCH, text=0, text_last=False, **more):
    return {KEY: override, forward.KEY: forward.Forward(latent, patch, text, text_last), **more}


def node(model: Model | None = None, **given) -> Model:
    return NODE().execute(model or Model(), **(HERE | given))[0]


def override_of(**given):
    return sparse_override.SparseOverride(sparse_settings.Settings.parse(HERE | given))


def by_heads(*flat: torch.Tensor) -> list[torch.Tensor]:
    return [t.unflatten(-1, (-1, DIM)).transpose(1, 2) for t in flat]


def counts(override) -> dict[str, dict[str, int]]:
    return override.record.as_dict()


def reasons(override) -> str:
    found = counts(override)
    return "; ".join((*found["kept"], *found["fallbacks"]))


H3 = SimpleNamespace(
    seq_len=300,
    signature=(30, 3, 16, 20, 15),
    segments=((0, 20, "text"), (20, 30, "ref_img"), (30, 60, "audio"), (60, 300, "video")),
)  # fmt: skip


def sampling(override, sigmas: list[float], layers: int = 1, core=None, **more) -> list[torch.Tensor]:
    """Calls as a sampler with these sigmas makes them, where percent and sigma add up to 1."""
    override.record.begin(lambda percent: 1.0 - percent)
    q, k, v = tensors()
    core, schedule, outs = core or NewCore(), torch.tensor([*sigmas, 0.0]), []
    for sigma in sigmas:
        here = options(override, sigmas=torch.tensor([sigma]), sample_sigmas=schedule, cond_or_uncond=[0], **more)
        for layer in range(layers):
            outs.append(core.attention(q, k, v, HEADS, transformer_options={**here, "block_index": layer}))
    override.record.end()
    return outs


@pytest.fixture
def never_crowded(monkeypatch):
    """Four blocks are so few that the neighbours alone are most of them."""
    monkeypatch.setattr(part("shares"), "MAX_SHARE", 1.0)
