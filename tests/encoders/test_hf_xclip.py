# SPDX-License-Identifier: Apache-2.0
"""transformers' X-CLIP: a message of the other frames is no patch, and places stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import visprune
from tests.encoders import hf, oracle
from tests.encoders.small import enlarged, listed
from visprune.errors import UnsupportedModel

FRAMES, METHODS = 2, {"tome": {"r": 4}, "pitome": {"keep_ratio": 0.8}}
KEEPING: dict[str, dict[str, Any]] = {"tome": {"r": 0}, "pitome": {"keep_ratio": 1.0}}


def build(outer: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {n: hf.SIZES[n] for n in ("hidden_size", "intermediate_size", "num_hidden_layers",
                                      "num_attention_heads")}  # fmt: skip
    vision = {**sizes, "image_size": 24, "patch_size": 4, "num_frames": FRAMES,
              "drop_path_rate": 0.0, "mit_hidden_size": 32, "mit_intermediate_size": 48,
              "mit_num_attention_heads": 4, "mit_num_hidden_layers": 1, **options}  # fmt: skip
    if not outer:
        config = transformers.XCLIPVisionConfig(**vision)
        return enlarged(transformers.XCLIPVisionModel(config)).eval()
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 0,
            "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip
    config = transformers.XCLIPConfig(
        text_config=text, vision_config=vision, projection_dim=32, prompt_num_attention_heads=4
    )
    return enlarged(transformers.XCLIPModel(config)).eval()


def pixels(clips: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clips * FRAMES, 3, 24, 24, generator=generator)


def of_clip(clips: int = 1) -> dict[str, Tensor]:
    words = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words),
            "pixel_values": pixels(clips).unflatten(0, (clips, FRAMES))}  # fmt: skip


@torch.no_grad()
def test_keeping_all_changes_no_bit() -> None:
    model, outer, x, clip = build(), build(outer=True), pixels(2), of_clip()
    want, scored = model(x), outer(**clip).logits_per_video
    for method, params in KEEPING.items():
        with visprune.prune(model, method, **params) as run:
            got = model(x, output_hidden_states=True)
            assert torch.equal(got.last_hidden_state, want.last_hidden_state)
            assert torch.equal(got.pooler_output, want.pooler_output)
            assert len(run.trace.stages) == hf.LAYERS
        with visprune.prune(outer, method, **params):
            assert torch.equal(outer(**clip).logits_per_video, scored)
    for method, params in METHODS.items():
        with visprune.prune(outer, method, **params) as run:
            assert not torch.equal(outer(**clip).logits_per_video, scored)
            assert all(len(kept) < 36 for kept in run.kept)
    assert torch.equal(outer(**clip).logits_per_video, scored)


@torch.no_grad()
def test_merged_tokens_are_those_of_the_layers_on_what_is_left() -> None:
    model, x = build(), pixels(2)
    with visprune.prune(model, "tome", r=6) as run:
        got = model(x, output_hidden_states=True)
        chosen = [run._reducer.latest.selections[layer, layer] for layer in range(hf.LAYERS)]
    y = model.pre_layernorm(model.embeddings(x))
    size, places = torch.ones(len(x), 36), torch.arange(36).expand(len(x), -1)
    for layer, selection in zip(model.encoder.layers, chosen, strict=True):
        bias = torch.nn.functional.pad(size.log(), (1, 1))[:, None, None]
        y = layer(y, bias)
        matrix = selection.matrix()
        shares = (matrix > 0).float()
        size = (shares @ size[..., None])[..., 0]
        y = torch.cat([y[:, :1], matrix @ y[:, 1:]], dim=1)
        places = selection.dest().gather(1, places)
    assert y.shape[1] == 1 + 36 - 18
    whole = y[:, 1:].gather(1, places[..., None].expand(-1, -1, y.shape[-1]))
    oracle.assert_close(got.last_hidden_state, torch.cat([y[:, :1], whole], dim=1))
    oracle.assert_close(got.pooler_output, model.post_layernorm(y[:, 0]))
    assert [state.shape[1] for state in got.hidden_states[1:]] == [31, 25, 37]


@torch.no_grad()
def test_a_token_of_two_equal_patches_counts_as_both() -> None:
    model = build(outer=True)
    model.vision_model.embeddings.position_embedding.weight.zero_()
    clip = of_clip()
    clip["pixel_values"] = hf.in_pairs(clip["pixel_values"])
    want = model(**clip).logits_per_video
    with visprune.prune(model, "tome", r=[18, 0, 0]) as run:
        got = model(**clip).logits_per_video
        assert set(torch.cat(run.trace.sizes).tolist()) == {2.0}
    oracle.assert_close(got, want)


@torch.no_grad()
def test_the_keys_that_are_matched_are_those_of_the_patches() -> None:
    model, x = build(), pixels()
    seen: list[Tensor] = []
    attention = model.encoder.layers[0].self_attn
    handle = attention.k_proj.register_forward_hook(lambda m, a, out: seen.append(out))
    model(x)
    handle.remove()
    keys = seen[0][:, 1:-1].unflatten(-1, (4, -1)).mean(2)
    ones = torch.ones(len(x), 36)
    want = [
        oracle.matched_by_hand(keys[row : row + 1], ones[row : row + 1], 5, prefix=1)
        for row in range(len(x))
    ]
    with visprune.prune(model, "tome", r=[5, 0, 0]) as run:
        model(x)
        got = run._reducer.latest.selections[0, 0].matrix()
    assert torch.equal(got > 0, torch.cat([each.matrix() for each in want]) > 0)


@pytest.mark.parametrize("method", ["topk", "evit", "random", "spatten", "ficoco_v", "diffrate"])
def test_what_it_cannot(method: str) -> None:
    params = {"diffrate": {}, "ficoco_v": {}}.get(method, {"keep_ratio": 0.8})
    with pytest.raises(
        UnsupportedModel, match=r"(one place|message of the other frames).*Methods that fit it"
    ) as e:
        visprune.prune(build(), method, **params)
    named = set(str(e.value).rpartition(": ")[2].rstrip(".").split(", "))
    assert named == {"keep_all", "tome", "pitome", "ipcv"}
    assert named == listed("transformers.XCLIPVisionModel")


def test_gradients_under_checkpointing() -> None:
    model, x = build().train(), pixels(2).requires_grad_()

    def gradients() -> dict[str, Tensor]:
        model(x).last_hidden_state.square().sum().backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    with visprune.prune(model, "tome", r=4):
        want = gradients()
        assert all(bool(torch.isfinite(grad).all()) for grad in want.values())
        for reentrant in (False, True):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
            got = gradients()
            assert got.keys() == want.keys()
            for key, grad in want.items():
                oracle.assert_close(got[key], grad)


@torch.no_grad()
def test_the_cost_is_what_a_counter_counts() -> None:
    model, x = build(attn_implementation="eager"), pixels(2)
    model.config._attn_implementation = "eager"
    for method, params in (("keep_all", {}), *METHODS.items()):
        with visprune.prune(model, method, **params) as run:
            with FlopCounterMode(display=False) as counter:
                model(x)
            cost = run.cost()
        counted = counter.get_total_flops() // 2
        assert cost.vision <= counted <= cost.vision + cost.selection, method


@torch.no_grad()
def test_threads_a_copy_and_compiled() -> None:
    model = build()
    clips = [pixels(1, seed) for seed in range(6)]
    with visprune.prune(model, "tome", r=4):
        want, twin = oracle.threads_equal_turns(model, clips, lambda out: out.last_hidden_state)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager")
        assert torch.equal(compiled(clips[0]).last_hidden_state, want[0])
        assert torch.equal(compiled(clips[0]).last_hidden_state, want[0])
    assert torch.equal(twin(clips[0]).last_hidden_state, want[0])
    visprune.remove(twin)
    assert torch.equal(twin(clips[0]).last_hidden_state, model(clips[0]).last_hidden_state)
