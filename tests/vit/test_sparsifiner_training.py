# SPDX-License-Identifier: Apache-2.0
"""Both training stages of Sparsifiner, with a dense teacher."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.vit.shrunk import build, images, small_kwargs, stir
from visprune.backbones.vit import SparsifinerLoss, stage_parameters
from visprune.backbones.vit.sparsifiner import checkpoint_filter_fn
from visprune.backbones.vit.sparsifiner_training import (
    attention_probabilities,
    logit_distillation,
    reconstruction_loss,
    teacher_outputs,
)
from visprune.errors import ConfigError

NAME = "sparsifiner_deit_small"


def pair(**kwargs: Any) -> tuple[Any, Any]:
    """A student that starts from its teacher's weights."""
    torch.manual_seed(0)
    teacher = timm.create_model("deit_small_patch16_224", **small_kwargs(NAME)).eval()
    stir(teacher)
    student = build(NAME, **kwargs)
    student.load_state_dict(checkpoint_filter_fn(teacher.state_dict(), student))
    return student.train(), teacher


def test_teacher_attention_is_what_the_teacher_uses() -> None:
    _, teacher = pair()
    taught = teacher_outputs(teacher, images(), attention=True)
    assert [a.shape for a in taught.attention] == [(2, 2, 17, 17)] * 2
    x = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(images())))
    block = teacher.blocks[0]
    with torch.no_grad():
        v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 2, 16))[:, :, 2].transpose(1, 2)
        out = block.attn.proj((taught.attention[0] @ v).transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, block.attn(block.norm1(x)), rtol=1e-4, atol=1e-5)
        assert torch.equal(taught.logits, teacher(images()))
    assert not teacher.blocks[0].attn._forward_pre_hooks, "nothing stays on the teacher"
    assert teacher_outputs(teacher, images(), attention=False).attention == []


def test_losses_by_hand() -> None:
    student, teacher = pair()
    loss, targets = SparsifinerLoss(teacher, "classify"), torch.tensor([1, 3])
    total, parts = loss(student, images(), targets)
    with torch.no_grad():
        output, logits = student.forward_train(images()), teacher(images())
        tokens = teacher.forward_features(images())[:, 1:]
        want = {
            "class": F.cross_entropy(output.logits, targets),
            "logit": (logits.softmax(-1) * (logits.log_softmax(-1)
                      - output.logits.log_softmax(-1))).sum(-1).mean(),
            "token": (output.tokens - tokens).square().mean(),
        }  # fmt: skip
    for name, value in want.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        total.detach(), want["class"] + 0.5 * want["logit"] + 0.5 * want["token"],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    loss.stage = "reconstruct"
    total, parts = loss(student, images(), targets)
    with torch.no_grad():
        predicted = student.forward_train(images(), reconstruct=True).predicted
        attention = teacher_outputs(teacher, images(), attention=True).attention
    errors = [((p - a[:, :, 1:]) ** 2).sum() for p, a in zip(predicted, attention, strict=True)]
    torch.testing.assert_close(parts["reconstruct"], sum(errors) / 2)
    torch.testing.assert_close(total.detach(), 0.01 * parts["reconstruct"])


def test_the_student_starts_as_its_teacher() -> None:
    student, teacher = pair(attn_keep_rate=1.0)
    loss = SparsifinerLoss(teacher, "classify")
    _, parts = loss(student, images(), torch.tensor([0, 1]))
    assert parts["logit"] < 1e-6
    assert parts["token"] < 1e-6
    assert logit_distillation(torch.zeros(1, 4), torch.zeros(1, 4)) == 0


def test_stages_train_their_own_parameters() -> None:
    student, _ = pair()
    names = {id(p): n for n, p in student.named_parameters()}
    first = {names[id(p)] for p in stage_parameters(student, "reconstruct")}
    second = {names[id(p)] for p in stage_parameters(student, "classify")}
    assert first
    assert all(".mask_predictor." in n for n in first)
    assert not first & second
    assert first | second == set(names.values())
    both, _ = pair(sparsity={"mask_gradient": "straight_through"})
    assert len(stage_parameters(both, "classify")) == len(names)


def run(loss: SparsifinerLoss, student: Any, stage: Any, steps: int, lr: float) -> list[float]:
    loss.stage = stage
    optimizer = torch.optim.AdamW(stage_parameters(student, stage), lr=lr)
    found = []
    for _ in range(steps):
        total, _ = loss(student, images(4), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(float(total.detach()))
    return found


def test_two_stages_learn() -> None:
    student, teacher = pair(rank=12)
    with torch.no_grad():
        for model in (student, teacher):  # sharp attention: something to reconstruct
            for block in model.blocks:
                block.attn.qkv.weight[:64] *= 3
    loss = SparsifinerLoss(teacher)
    agreement = overlap(student, teacher)
    frozen = {n: p.clone() for n, p in student.named_parameters() if "mask_pred" not in n}
    first = run(loss, student, "reconstruct", 60, 1e-2)
    assert first[-1] < 0.7 * first[0]
    assert all(torch.equal(p, frozen[n]) for n, p in student.named_parameters() if n in frozen)
    learned, best = overlap(student, teacher), overlap(student, teacher, best=True)
    assert learned - agreement > 0.5 * (best - agreement), "the keys chosen are the teacher's"
    second = run(loss, student, "classify", 25, 3e-4)
    assert second[-1] < 0.9 * second[0]
    assert all(p.requires_grad is False and p.grad is None for p in teacher.parameters())
    assert not teacher.training


def overlap(student: Any, teacher: Any, best: bool = False) -> float:
    """Teacher's attention to the keys chosen in the first block, or to the best of that number."""
    with torch.no_grad():
        x = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(images(4))))
        attn = student.blocks[0].attn
        x = student.blocks[0].norm1(x)
        truth = attention_probabilities(teacher.blocks[0].attn, x)[:, :, 1:]
        q, k, _ = attn.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        idx = attn.mask_predictor.select(*attn.mask_predictor(q, k))
        idx = truth.topk(idx.shape[-1]).indices if best else idx
        return float(truth.gather(-1, idx).sum(-1).mean())


def test_token_pruning_distils_the_tokens_that_are_left() -> None:
    student, teacher = pair(token_pruning_loc=(0,), token_keep_rate=0.5, attn_keep_rate=1.0)
    loss = SparsifinerLoss(teacher, "classify")
    total, parts = loss(student, images(), torch.tensor([0, 1]))
    output = student.forward_train(images())
    tokens = teacher.forward_features(images())[:, 1:]
    want = torch.stack([tokens[i, output.kept[i]] for i in range(2)])
    torch.testing.assert_close(parts["token"], (output.tokens - want).square().mean().detach())
    total.backward()


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        student, teacher = pair(token_pruning_loc=(0,), token_keep_rate=0.5)
        student.set_grad_checkpointing(recompute)
        total, _ = SparsifinerLoss(teacher, "classify")(student, images(), torch.tensor([0, 1]))
        total.backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    _, teacher = pair()
    with pytest.raises(ConfigError, match="'reconstruct' or 'classify'; got 'distil'"):
        SparsifinerLoss(teacher, "distil")  # type: ignore[arg-type]
    deep = build(NAME, depth=3)
    with pytest.raises(ConfigError, match="equally deep"):
        SparsifinerLoss(teacher)(deep, images(), torch.tensor([0, 1]))
    with pytest.raises(ConfigError, match="same heads and tokens"):
        reconstruction_loss([torch.zeros(1, 2, 4, 5)], [torch.zeros(1, 3, 5, 5)])
