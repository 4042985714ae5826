# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of a few drawn pictures, written in the formats in which they are published."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

TEN = ["red"] * 6 + ["Red"] * 2 + ["blue", "dark red"]


def drawn(color: str, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A picture of one colour."""
    return Image.new("RGB", size, color)


def save(path: Path, color: str = "red") -> None:
    """Write a picture, its folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn(color).save(path)


def dump(path: Path, value: Any) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def vqav2(root: Path) -> None:
    """The official download: questions, annotations, val2014."""
    questions = [
        {"image_id": 42, "question": "What color is it?", "question_id": 42000},
        {"image_id": 42, "question": "Is it red?", "question_id": 42001},
        {"image_id": 73, "question": "How many?", "question_id": 73000},
    ]
    told = [
        {
            "question_id": q["question_id"],
            "image_id": q["image_id"],
            "question_type": "what color is the",
            "answer_type": "other" if q["question_id"] != 42001 else "yes/no",
            "multiple_choice_answer": "red",
            "answers": [
                {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
                for i, text in enumerate(TEN)
            ],
        }
        for q in questions
    ]
    dump(root / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    dump(root / "v2_mscoco_val2014_annotations.json", {"annotations": told})
    for number in (42, 73):
        save(root / f"val2014/COCO_val2014_{number:012d}.jpg")


def vqav2_test_dev(root: Path) -> None:
    """LLaVA's question file of test-dev, test2015/."""
    ask = "Answer the question using a single word or phrase."
    rows = [
        {
            "question_id": 262144000 + number,
            "image": "COCO_test2015_000000262144.jpg",
            "text": f"{question}\n{ask}",
            "category": "default",
        }
        for number, question in enumerate(["Is the ball flying?", "What sport is it?"])
    ]
    dump_lines(root / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    more = {**rows[0], "question_id": 1000}
    dump_lines(root / "llava_vqav2_mscoco_test2015.jsonl", [more, *rows])
    save(root / "test2015/COCO_test2015_000000262144.jpg")


def gqa(root: Path) -> None:
    """LLaVA's layout: data/ with questions and images."""
    dump(
        root / "data/testdev_balanced_questions.json",
        {
            "201307251": {
                "imageId": "n161313",
                "question": "Is it overcast?",
                "answer": "no",
                "isBalanced": True,
                "types": {"structural": "verify", "semantic": "global", "detailed": "weather"},
            },
            "201640614": {
                "imageId": "n161313",
                "question": "Who is wearing the dress?",
                "answer": "woman",
                "isBalanced": True,
                "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
            },
        },
    )
    save(root / "data/images/n161313.jpg")


def textvqa(root: Path) -> None:
    """Annotations, pictures and LLaVA's file with OCR tokens."""
    rows = [
        {
            "question": "what is the brand of this camera?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34602,
            "answers": ["dakota"] * 8 + ["dakota digital", "clos culombu"],
        },
        {
            "question": "what does the small white text spell?",
            "image_id": "003a8ae2ef43b901",
            "question_id": 34603,
            "answers": ["copenhagen"] * 10,
        },
    ]
    dump(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    dump_lines(
        root / "llava_textvqa_val_v051_ocr.jsonl",
        [
            {
                "question_id": row["image_id"],
                "image": f"{row['image_id']}.jpg",
                "text": f"{row['question']}\nReference OCR token: DAKOTA, DIGITAL\n"
                "Answer the question using a single word or phrase.",
                "category": "default",
            }
            for row in rows
        ],
    )
    save(root / "train_images/003a8ae2ef43b901.jpg")


def vizwiz(root: Path) -> None:
    """val.json and val/."""
    answers = [{"answer": a, "answer_confidence": "yes"} for a in ["unanswerable"] * 7 + TEN[:3]]
    rows = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": "Ok. What's this?",
            "answers": answers,
            "answer_type": "unanswerable",
            "answerable": 0,
        }
        for number in range(2)
    ]
    dump(root / "val.json", rows)
    for row in rows:
        save(root / "val" / str(row["image"]))


def pope(root: Path) -> None:
    """The three official files in coco/, beside val2014/."""
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": number,
                "image": "COCO_val2014_000000310196.jpg",
                "text": f"Is there a {thing} in the image?",
                "label": label,
            }
            for number, (thing, label) in enumerate(
                [("snowboard", "yes"), (f"{split} car", "no")], start=1
            )
        ]
        dump_lines(root / f"coco/coco_pope_{split}.json", rows)
    save(root / "val2014/COCO_val2014_000000310196.jpg")


def mme(root: Path) -> None:
    """One category with flat files, one with folders for texts and pictures."""
    base = root / "MME_Benchmark_release_version"
    pair = "Is it {}? Please answer yes or no.\tYes\nIs it {}? Please answer yes or no.\tNo\n"
    for category, texts, pictures in (
        ("count", "", ""),
        ("posters", "questions_answers_YN", "images"),
    ):
        for name in ("0001", "0002"):
            save(base / category / pictures / f"{name}.jpg")
            told = base / category / texts / f"{name}.txt"
            told.parent.mkdir(parents=True, exist_ok=True)
            told.write_text(pair.format("one", "two"), encoding="utf-8")


def scienceqa(root: Path) -> None:
    """problems.json, pid_splits.json, images/test/PID/image.png."""
    problem = {
        "question": "What is the name of the colony shown?",
        "choices": ["Maryland", "New Hampshire", "Rhode Island", "Vermont"],
        "answer": 1,
        "hint": "",
        "image": "image.png",
        "task": "closed choice",
        "grade": "grade5",
        "subject": "social science",
        "split": "test",
    }
    hinted = {"hint": "Figure: Shenandoah.", "choices": ["It is dry.", "It is wet."], "answer": 0}
    problems = {
        "11": problem,
        "16": {**problem, "image": None},
        "21": {**problem, **hinted},
    }
    dump(root / "problems.json", problems)
    dump(root / "pid_splits.json", {"train": [], "val": [], "test": ["11", "16", "21"]})
    for name in ("11", "21"):
        save(root / f"images/test/{name}/image.png")


def mmbench(root: Path) -> None:
    """The table with pictures in base64: two questions, circular shifts beside."""
    buffer = io.BytesIO()
    drawn("red").save(buffer, "JPEG")
    picture = base64.b64encode(buffer.getvalue()).decode()
    columns = [
        *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"),
        *("source", "l2-category", "comment", "split"),
    ]
    rows = [
        (241, "Which is right?", "", "one", "two", "three", "four", "B", "identity_reasoning"),
        (1000241, "Which is right?", "", "two", "three", "four", "one", "A", "identity_reasoning"),
        (252, 'Is "this"\nred?', "A hint.", "yes", "no", "", "", "A", "color"),
        (1000252, 'Is "this"\nred?', "A hint.", "no", "yes", "", "", "B", "color"),
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "mmbench_dev_20230712.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        for row in rows:
            # As VLMEvalKit's table: a repeated picture is the index of the row that has it.
            writer.writerow([*row, picture if row[0] < 1_000_000 else "241", "s", "l", "", "dev"])


def seedbench(root: Path) -> None:
    """SEED-Bench.json with a picture and a video, SEED-Bench-image/."""
    row = {
        "answer": "A",
        "choice_a": "One",
        "choice_b": "Two",
        "choice_c": "Three",
        "choice_d": "Four",
        "data_id": "1454426_2591111986",
        "data_type": "image",
        "question": "How many towels are in the image?",
        "question_id": "101669",
        "question_type_id": 5,
        "segment": [],
    }
    video = {**row, "data_type": "video", "question_id": "v1", "question_type_id": 10}
    types = {"Instances Counting": 5}
    dump(root / "SEED-Bench.json", {"question_type": types, "questions": [row, video]})
    save_as = root / "SEED-Bench-image/1454426_2591111986"
    save_as.parent.mkdir(parents=True, exist_ok=True)
    drawn("white").save(save_as, "JPEG")


def refcoco(root: Path) -> None:
    """Qwen-VL's evaluation file: boxes in pixels, corners."""
    dump_lines(
        root / "refcoco_testA.jsonl",
        [
            {
                "image": "train2014/1.jpg",
                "sent": "left man",
                "bbox": [3.0, 2.0, 9.0, 6.0],
                "width": 12,
                "height": 8,
            }
        ],
    )
    save(root / "train2014/1.jpg")


def imagenet(root: Path) -> None:
    """An ImageFolder of synsets below val/."""
    for synset in ("n01443537", "n01440764"):
        save(root / f"val/{synset}/ILSVRC2012_val_00000{synset[-3:]}.JPEG")


def ocrbench(root: Path) -> None:
    """OCRBench.json, whose answers are texts or lists, and OCRBench_Images/."""
    rows = [
        ("IC15_1811", "IC15/1.jpg", "what is written in the image?", ["CENTRE"],
         "Regular Text Recognition"),
        ("HME100k", "HME/2.jpg", "Please write out the expression.", r"\frac { 1 } { 2 }",
         "Handwritten Mathematical Expression Recognition"),
        ("STVQA", "ST/3.jpg", "What is the price?", ["12", "twelve"], "Scene Text-centric VQA"),
    ]  # fmt: skip
    names = ("dataset_name", "image_path", "question", "answers", "type")
    dump(root / "OCRBench.json", [dict(zip(names, row, strict=True)) for row in rows])
    for row in rows:
        save(root / "OCRBench_Images" / str(row[1]))


def docvqa(root: Path) -> None:
    """val_v1.0_withQT.json and documents/."""
    rows = [
        {
            "questionId": number,
            "question": question,
            "question_types": kinds,
            "image": "documents/xnbl0037_1.png",
            "docId": 279,
            "ucsf_document_id": "xnbl0037",
            "ucsf_document_page_no": "1",
            "answers": answers,
            "data_split": "val",
        }
        for number, question, kinds, answers in (
            (337, "what is the date in the letter?", ["handwritten", "form"], ["1/8/93"]),
            (338, "what is the contact person name?", ["form"], ["P. Carter", "p. carter"]),
        )
    ]
    told = {"dataset_name": "SP-DocVQA", "dataset_split": "val", "data": rows}
    dump(root / "val_v1.0_withQT.json", told)
    save(root / "documents/xnbl0037_1.png")


def infovqa(root: Path) -> None:
    """infographicsVQA_val_v1.0_withQT.json and infographicsvqa_images/."""
    row = {
        "questionId": 98313,
        "question": "Which social platform has heavy female audience?",
        "image_local_name": "37313.jpeg",
        "image_url": "https://example.org/37313.jpg",
        "ocr_output_file": "37313.json",
        "answers": ["pinterest"],
        "answer_type": ["single span"],
        "operation/reasoning": [],
        "data_split": "val",
    }
    dump(root / "infographicsVQA_val_v1.0_withQT.json", {"data": [row]})
    save(root / "infographicsvqa_images/37313.jpeg")


def chartqa(root: Path) -> None:
    """test_human.json, test_augmented.json and png/."""
    for part, rows in (
        ("human", [("1.png", "How many food item is shown?", "14"),
                   ("1.png", "Is the sum above 60?", "Yes")]),
        ("augmented", [("2.png", "What was the share in 2011?", "31.67")]),
    ):  # fmt: skip
        names = ("imgname", "query", "label")
        dump(root / f"test_{part}.json", [dict(zip(names, row, strict=True)) for row in rows])
    for number in (1, 2):
        save(root / f"png/{number}.png")


LOCAL: dict[str, Callable[[Path], None]] = {
    "vqav2": vqav2,
    "gqa": gqa,
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "pope": pope,
    "mme": mme,
    "scienceqa_img": scienceqa,
    "mmbench_en": mmbench,
    "seedbench_image": seedbench,
    "ocrbench": ocrbench,
    "docvqa": docvqa,
    "infovqa": infovqa,
    "chartqa": chartqa,
    "refcoco_rec": refcoco,
    "imagenet": imagenet,
}
