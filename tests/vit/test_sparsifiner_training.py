# SPDX-License-Identifier: Apache-2.0
"""Both training stages of Sparsifiner with a dense teacher, on the losses of ``visprune train``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import visprune
from tests.train import small
from tests.vit.shrunk import build, images, small_kwargs, stir
from visprune.backbones.vit import stage_parameters
from visprune.backbones.vit.sparsifiner import checkpoint_filter_fn
from visprune.backbones.vit.sparsifiner_training import (
    attention_probabilities,
    check_stage,
    reconstruction_loss,
    teacher_outputs,
)
from visprune.errors import ConfigError
from visprune.train.image.losses import token_distillation
from visprune.train.image.reading import build_recipe
from visprune.train.image.student import Student

NAME = "sparsifiner_deit_small"
SHAPE = {"img_size": small.SIDE, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
RECON_EPOCHS = 2  # before them the predictors learn, after them the rest


def pair(**kwargs: Any) -> tuple[Any, Any]:
    """A student that starts from its teacher's weights."""
    torch.manual_seed(0)
    teacher = timm.create_model("deit_small_patch16_224", **small_kwargs(NAME)).eval()
    stir(teacher)
    student = build(NAME, **kwargs)
    student.load_state_dict(checkpoint_filter_fn(teacher.state_dict(), student))
    return student.train(), teacher


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.make_folder(tmp_path_factory.mktemp("data"), train=3, val=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a dense model of sharp attention: something to reconstruct."""
    torch.manual_seed(0)
    teacher = timm.create_model("deit_small_patch16_224", num_classes=3, **SHAPE)
    stir(teacher)
    with torch.no_grad():
        for block in teacher.blocks:
            block.attn.qkv.weight[:64] *= 3
    return visprune.save_pretrained(teacher, tmp_path_factory.mktemp("dense") / "weights")


def trainer(data: Path, dense: Path, epoch: float, **args: Any) -> Student:
    """What ``visprune train`` trains, at a point of time; the model starts as its teacher."""
    raw = small.recipe(
        data,
        model={"name": NAME, "start_from": str(dense), "args": {**SHAPE, **args}},
        distill={"teacher": str(dense), "logit": 0.5, "token": 0.5},
        sparse={"recon_epochs": RECON_EPOCHS, "recon_weight": 0.01},
        augment={},
    )
    student = Student(build_recipe(raw, "here"), torch.device("cpu"))
    student.set_epoch(epoch)
    return student


def pictures(count: int = 2) -> torch.Tensor:
    return images(count, small.SIDE, small.SIDE)


def target(*classes: int) -> torch.Tensor:
    return F.one_hot(torch.tensor(classes), 3).float()


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


def test_losses_by_hand(data: Path, dense: Path) -> None:
    student, x = trainer(data, dense, RECON_EPOCHS), pictures()
    model, teacher = student.model, student.teacher
    logits, total = student.loss(x, target(1, 2))
    with torch.no_grad():
        output, theirs = model.forward_train(x), teacher(x)
        torch.testing.assert_close(logits, output.logits)
        tokens = teacher.forward_features(x)[:, 1:]
        logit = (theirs.softmax(-1) * (theirs.log_softmax(-1)
                 - logits.log_softmax(-1))).sum(-1).mean()  # fmt: skip
        token = (output.tokens - tokens).square().mean()
        hard = F.cross_entropy(logits, torch.tensor([1, 2]))
    torch.testing.assert_close(
        total.detach(), hard + 0.5 * logit + 0.5 * token, rtol=1e-4, atol=1e-5
    )
    student.set_epoch(0)
    _, total = student.loss(x, target(1, 2))
    with torch.no_grad():
        predicted = model.forward_train(x, reconstruct=True).predicted
        attention = teacher_outputs(teacher, x, attention=True).attention
    errors = [((p - a[:, :, 1:]) ** 2).sum() for p, a in zip(predicted, attention, strict=True)]
    torch.testing.assert_close(total.detach(), 0.01 * sum(errors) / 2 / len(x))


def test_the_student_starts_as_its_teacher(data: Path, dense: Path) -> None:
    student, x = trainer(data, dense, RECON_EPOCHS, attn_keep_rate=1.0), pictures()
    logits, total = student.loss(x, target(0, 1))
    hard = F.cross_entropy(logits, torch.tensor([0, 1]))
    assert abs(float(total.detach() - hard.detach())) < 1e-6


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


def run(student: Student, steps: int, lr: float) -> list[float]:
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr)
    found = []
    for _ in range(steps):
        _, total = student.loss(pictures(4), target(0, 1, 2, 0))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        found.append(float(total.detach()))
    return found


def test_two_stages_learn(data: Path, dense: Path) -> None:
    student = trainer(data, dense, 0, rank=12)
    model, teacher = student.model, student.teacher
    agreement = overlap(model, teacher)
    frozen = {n: p.clone() for n, p in model.named_parameters() if "mask_pred" not in n}
    first = run(student, 60, 1e-2)
    assert first[-1] < 0.7 * first[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    learned, best = overlap(model, teacher), overlap(model, teacher, best=True)
    assert learned - agreement > 0.5 * (best - agreement), "the keys chosen are the teacher's"
    student.set_epoch(RECON_EPOCHS)
    second = run(student, 25, 3e-4)
    assert second[-1] < 0.9 * second[0]
    assert all(p.requires_grad is False and p.grad is None for p in teacher.parameters())
    assert not teacher.training


def overlap(student: Any, teacher: Any, best: bool = False) -> float:
    """Teacher's attention to the keys chosen in the first block, or to the best of that number."""
    with torch.no_grad():
        x = teacher.norm_pre(teacher._pos_embed(teacher.patch_embed(pictures(4))))
        attn = student.blocks[0].attn
        x = student.blocks[0].norm1(x)
        truth = attention_probabilities(teacher.blocks[0].attn, x)[:, :, 1:]
        q, k, _ = attn.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        idx = attn.mask_predictor.select(*attn.mask_predictor(q, k))
        idx = truth.topk(idx.shape[-1]).indices if best else idx
        return float(truth.gather(-1, idx).sum(-1).mean())


def test_token_pruning_says_which_tokens_are_left() -> None:
    # Of a student that sees every key, the patches that are dropped after the last block are all
    # that differs from its teacher: those that are left are the teacher's, at their places.
    student, teacher = pair(token_pruning_loc=(1,), token_keep_rate=0.5, attn_keep_rate=1.0)
    output = student.forward_train(images())
    assert output.kept.shape == output.tokens.shape[:2] == (2, 8)
    theirs = teacher.forward_features(images())[:, 1:]
    theirs = theirs.gather(1, output.kept[..., None].expand_as(output.tokens))
    loss = token_distillation(output.tokens, theirs)
    assert loss < 1e-8
    loss.backward()
    assert student.blocks[0].attn.qkv.weight.grad is not None


def test_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        student, _ = pair(token_pruning_loc=(0,), token_keep_rate=0.5)
        student.set_grad_checkpointing(recompute)
        output = student.forward_train(images())
        (output.logits.square().sum() + output.tokens.sum()).backward()
        grads.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-5, atol=1e-6)


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="'reconstruct' or 'classify'; got 'distil'"):
        check_stage("distil")
    with pytest.raises(ConfigError, match="equally deep"):
        reconstruction_loss([torch.zeros(1, 2, 4, 5)], [torch.zeros(1, 2, 5, 5)] * 2)
    with pytest.raises(ConfigError, match="same heads and tokens"):
        reconstruction_loss([torch.zeros(1, 2, 4, 5)], [torch.zeros(1, 3, 5, 5)])


@pytest.mark.parametrize("stage", ["reconstruct", "classify"])
def test_a_stage_runs_under_ddp(stage: Any, tmp_path: Path) -> None:
    """DDP waits for a gradient of everything that requires one, and says so in the second step."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        student, teacher = pair()
        stage_parameters(student, stage)
        student.forward = partial(student.forward_train, reconstruct=stage == "reconstruct")
        spread = torch.nn.parallel.DistributedDataParallel(student)
        for _ in range(2):
            output = spread(images())
            target = teacher_outputs(teacher, images(), attention=stage == "reconstruct")
            if stage == "reconstruct":
                loss = reconstruction_loss(output.predicted, target.attention)
            else:
                loss = F.mse_loss(output.logits, target.logits)
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
