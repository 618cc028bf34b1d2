"""The grid of tokens that `SageSparseAttention` finds for a model's pass."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from sparse_node import (  # noqa: E402
    H3,
    LATENT,
    forward,
    grid,
    node,
)


@pytest.mark.parametrize(
    ("tokens", "told", "found"),
    [
        (240, ((1, 16, 3, 16, 20), (1, 2, 2)), (3, 8, 10, 0, 0)),
        (240, ((1, 16, 3, 15, 19), (1, 2, 2)), (3, 8, 10, 0, 0)),  # padded to whole patches
        (320, ((1, 16, 3, 16, 20), (1, 2, 2), 512), (4, 8, 10, 0, 0)),  # a reference frame; the text is not among the tokens
        (340, ((1, 16, 3, 16, 20), (1, 2, 2), 100), (3, 8, 10, 100, 0)),
        (340, ((1, 16, 3, 16, 20), (1, 2, 2), 100, True), (3, 8, 10, 0, 100)),
        (960, ((1, 128, 3, 16, 20), (1, 1, 1)), (3, 16, 20, 0, 0)),
        (4096 + 77, ((1, 16, 128, 128), (1, 2, 2), 77), (1, 64, 64, 77, 0)),
        (341, ((1, 16, 3, 16, 20), (1, 2, 2), 100), "101 tokens beside"),
        (200, ((1, 16, 3, 16, 20), (1, 2, 2), 100), "fewer than"),
        (240, ((), (1, 2, 2)), "does not tell"),
        (240, ((1, 16, 3, 16, 20), None), "does not tell"),
    ],
)
def test_grid(tokens, told, found):
    here = grid.find(tokens, {forward.KEY: forward.Forward(*told)})
    assert found in here if isinstance(found, str) else here[:5] == found and here.tokens == tokens


def test_grid_of_h3_is_its_own_table():
    here = grid.find(300, {"minimax_h3_layout": H3})
    assert here[:5] == (3, 8, 10, 60, 0) and here.exact_rows == (30, 60) and here.segments == (20, 10, 30)
    assert isinstance(grid.find(299, {"minimax_h3_layout": H3}), str)  # a refiner's tokens, not those of the layout
    crooked = SimpleNamespace(seq_len=300, signature=(30, 3, 16, 22, 15), segments=H3.segments)
    assert "240 tokens" in grid.find(300, {"minimax_h3_layout": crooked})


@pytest.mark.parametrize(
    ("network", "patch"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 2, 2)),
        ({"patch_size": [1, 2, 2]}, (1, 2, 2)),
        ({"patch_size": 2}, (1, 2, 2)),
        ({"patch_size": [1, 1]}, (1, 1, 1)),
        ({"patchifier": SimpleNamespace(patch_size=(1, 1, 1))}, (1, 1, 1)),
        ({"patch_spatial": 2, "patch_temporal": 1}, (1, 2, 2)),
        ({}, None),
        ({"patch_size": "two"}, None),
    ],
)
def test_a_pass_tells_its_latent_and_the_model_s_patch(network, patch):
    model, seen = node(), []
    (wrapper,) = model.wrappers[forward.APPLY_MODEL][forward.KEY]

    class Executor:
        class_obj = SimpleNamespace(diffusion_model=SimpleNamespace(**network))

        def __call__(self, *args, **kwargs):
            seen.append((args, kwargs))
            return "denoised"

    latent, text, given = torch.zeros(LATENT), torch.zeros(2, 77, 8), {"sigmas": torch.ones(1)}
    assert wrapper(Executor(), latent, torch.ones(2), None, text, None, given, txt_byt5=torch.zeros(2, 5, 8), y=1) == "denoised"
    args, kwargs = seen[0]
    assert args[0] is latent and kwargs["y"] == 1 and args[5]["sigmas"] is given["sigmas"] and forward.KEY not in given
    assert args[5][forward.KEY] == forward.Forward(LATENT, patch, 82, False)


def test_patching_twice_observes_once():
    assert len(node(node()).wrappers[forward.APPLY_MODEL][forward.KEY]) == 1
