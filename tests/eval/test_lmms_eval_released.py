# SPDX-License-Identifier: Apache-2.0
"""The released lmms-eval runs the plug-in, in an environment of its own (`make lmms` makes it)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import visprune
from visprune.backbones.vlm import embedded
from visprune.eval.models.vlm import VLM
from visprune.eval.tasks.embedded.task import EmbeddedTask

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-lmms" / "bin" / "python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no .venv-lmms with the released lmms-eval; `make lmms` makes one"
)

QUESTIONS = 5
TASK = """
task: mini
dataset_path: parquet
dataset_kwargs:
  data_files: {test: DATA}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: !function utils.doc_to_text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 2, temperature: 0, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lmms-eval: a YAML beside a table of our questions."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"image": sample.image(), "question": sample.question, "answer": sample.answers[0]}
        for sample in EmbeddedTask(limit=QUESTIONS).samples()
    ]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "question": text, "answer": text})
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(folder / "test.parquet"))
    (folder / "mini.yaml").write_text(TASK.replace("DATA", str(folder / "test.parquet")))
    (folder / "utils.py").write_text(UTILS)
    return folder


def run(task: Path, out: Path, arguments: str) -> tuple[list[str], float, str]:
    """Answers in order, the score, and what was shown."""
    words = ["-m", "lmms_eval", "--model", "visprune", "--model_args", arguments, "--tasks", "mini",
             "--include_path", str(task), "--batch_size", "2", "--output_path", str(out),
             "--log_samples"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home"),
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run([str(PYTHON), *words], env=environment, cwd=out, text=True, timeout=300,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = out.rglob("*_samples_mini.jsonl")
    (results,) = out.rglob("*_results.json")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    lines.sort(key=lambda line: line["doc_id"])
    score = json.loads(results.read_text(encoding="utf-8"))["results"]["mini"]["exact_match,none"]
    return [line["filtered_resps"] for line in lines], float(score), done.stderr


def expected(model: Any, processor: Any) -> list[str]:
    """What the model answers to the same questions in its chat template."""
    vlm = VLM(model, processor, name="own")
    found = []
    for sample in EmbeddedTask(limit=QUESTIONS).samples():
        content = [{"type": "image"}, {"type": "text", "text": sample.question}]
        text = vlm.chat([{"role": "user", "content": content}])
        inputs = processor(text=[text], images=[[sample.image()]], return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(processor.tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def test_answers_under_a_method_are_the_model_s_own_and_progress_is_shown(
    task: Path, tmp_path: Path
) -> None:
    answers, score, shown = run(task, tmp_path, "pretrained=embedded,method=todre,num_keep=32")
    model, processor = embedded.load(torch.float32)
    with visprune.prune(model, "todre", num_keep=32):
        assert answers == expected(model, processor)
    right = [sample.answers[0] for sample in EmbeddedTask(limit=QUESTIONS).samples()]
    assert score == pytest.approx(sum(a == b for a, b in zip(answers, right, strict=True)) / 5)
    assert f"{QUESTIONS}/{QUESTIONS}" in shown.partition("Model Responding")[2]


def test_a_folder_saved_with_a_method_runs_with_it(task: Path, tmp_path: Path) -> None:
    model, processor = embedded.load(torch.float32)
    saved = tmp_path / "saved"
    with visprune.prune(model, "random", num_keep=4, seed=3) as pruned:
        visprune.save_pretrained(pruned, saved, processor=processor)
        wanted = expected(model, processor)
    (tmp_path / "out").mkdir()
    answers, _, shown = run(task, tmp_path / "out", f"pretrained={saved}")
    assert answers == wanted
    assert "was saved with" in shown
