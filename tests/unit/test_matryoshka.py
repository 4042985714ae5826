# SPDX-License-Identifier: Apache-2.0
"""The Matryoshka Query Transformer: official outputs, prefixes, files, and inside a LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import tiny
from tests.unit.golden_cases import cases, tensors
from visprune.backbones.projectors import MatryoshkaProjector
from visprune.backbones.projectors.matryoshka import sine_table
from visprune.errors import BudgetError, ConfigError


def weights(t: dict[str, Any]) -> dict[str, Tensor]:
    return {name[2:]: x for name, x in t.items() if name.startswith("w.")}


@cases("mqt")
@torch.no_grad()
def test_official_outputs(case: dict[str, Any]) -> None:
    t, p = tensors("mqt", case), case["params"]
    made = MatryoshkaProjector.from_state(weights(t), num_heads=p["num_heads"])
    got = made(t["x"], p["num_visual_tokens"], tuple(p["tgt_size"]))
    torch.testing.assert_close(got, t["out"], rtol=1e-4, atol=1e-5)
    # The table was rounded to half precision there.
    own = sine_table(p["kv_dim"], p["grid_size"])
    torch.testing.assert_close(t["w.pos_embed"], own, rtol=0, atol=1e-3)


@torch.no_grad()
def test_fewer_tokens_are_the_first_of_more() -> None:
    torch.manual_seed(0)
    made, x = MatryoshkaProjector(32, 24, num_heads=4, num_queries=16), torch.randn(2, 36, 32)
    whole = made(x)
    assert whole.shape == (2, 16, 24)
    for wanted in (1, 5, 16):
        torch.testing.assert_close(made(x, wanted), whole[:, :wanted])
    torch.testing.assert_close(made(x[1:], 5), whole[1:, :5])


def test_training_draws_even_numbers_up_to_all() -> None:
    made = MatryoshkaProjector(32, 24, num_heads=4, num_queries=16)
    generator = torch.Generator().manual_seed(3)
    drawn = [made.draw(generator) for _ in range(200)]
    assert set(drawn) == set(range(2, 18, 2))
    assert made(torch.randn(1, 36, 32)).shape[1] == drawn[-1]
    again = torch.Generator().manual_seed(3)
    assert [made.draw(again) for _ in range(200)] == drawn


@pytest.mark.parametrize("prefix", ["", "mm_projector.", "model.mm_projector."])
def test_files(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = MatryoshkaProjector(32, 24, num_heads=4, num_queries=16)
    state = {prefix + name: x.contiguous() for name, x in made.state_dict().items()}
    if prefix:
        state["model.layers.0.proj"] = torch.zeros(3, 3)
    save_file(state, tmp_path / "projector.safetensors")
    read = MatryoshkaProjector.from_file(tmp_path / "projector.safetensors", num_heads=4)
    x = torch.randn(2, 36, 32)
    assert torch.equal(read(x, 7), made(x, 7))
    (tmp_path / "mm_projector.bin").write_bytes(b"no such thing")
    with pytest.raises(ConfigError, match=r"Cannot read .*mm_projector\.bin as safetensors"):
        MatryoshkaProjector.from_file(tmp_path / "mm_projector.bin")


def test_what_is_refused() -> None:
    made = MatryoshkaProjector(32, 24, num_heads=4, num_queries=16)
    for wanted in (0, 17):
        with pytest.raises(BudgetError, match=rf"1 to 16 .*got {wanted}"):
            made(torch.randn(1, 36, 32), wanted)
    with pytest.raises(ConfigError, match=r"35 patches are no grid of 5 x 5; give grid"):
        made(torch.randn(1, 35, 32))
    with pytest.raises(ConfigError, match="square number, got 17"):
        MatryoshkaProjector(32, 24, num_queries=17)
    with pytest.raises(ConfigError, match=r"divisible by 4 .*width=30, num_heads=3"):
        MatryoshkaProjector(30, 24, num_heads=3, num_queries=16)
    with pytest.raises(ConfigError, match="hold no Matryoshka projector"):
        MatryoshkaProjector.from_state({"model.norm": torch.zeros(2)})
    state = made.state_dict()
    state.pop("ln_v.bias")
    with pytest.raises(ConfigError, match="Weights of another projector"):
        MatryoshkaProjector.from_state(state, num_heads=4)


@pytest.mark.parametrize("wanted", [2, 5])
def test_in_place_of_the_projector_of_a_llava(wanted: int) -> None:
    torch.manual_seed(0)
    model = tiny.build("llava")
    model.model.multi_modal_projector = MatryoshkaProjector(24, 32, num_heads=4, num_queries=16)
    model.model.multi_modal_projector.num_keep = wanted
    inputs = tiny.inputs("llava", [[3, "a", 6], [3, "b", 6]])
    row = inputs["input_ids"][0]
    short = torch.cat(
        [(row == tiny.IMAGE).nonzero()[:wanted, 0], (row != tiny.IMAGE).nonzero()[:, 0]]
    )
    ids = inputs["input_ids"][:, short.sort().values]
    output = model(input_ids=ids, pixel_values=inputs["pixel_values"], labels=ids)
    assert output.logits.shape[1] == 9 + wanted
    output.loss.backward()
    query = model.model.multi_modal_projector.query.grad
    assert bool(query[:wanted].abs().sum(1).gt(0).all())  # those in use learn
    assert not bool(query[wanted:].any())
