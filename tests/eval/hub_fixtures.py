# SPDX-License-Identifier: Apache-2.0
"""Copies of the Hub's repositories in small: parquet files and a README that names their splits.

The rows say the same as those of task_fixtures, in the Hub's columns.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import yaml

from tests.eval.task_fixtures import TEN, drawn


def _picture(color: str = "red") -> dict[str, Any]:
    buffer = io.BytesIO()
    drawn(color).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _vqa_answers() -> list[dict[str, Any]]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": i + 1}
        for i, text in enumerate(TEN)
    ]


def _choice(letters: str, index: int, answer: str, question: str, **more: Any) -> dict[str, Any]:
    words = letters.split() + ["nan"] * 4
    row = {"index": index, "question": question, "hint": "nan", "answer": answer}
    row |= dict(zip("ABCD", words, strict=False))
    return row | {"category": "c", "source": "s", "L2-category": "l", "split": "dev"} | more


# Task -> configuration -> split -> rows without pictures.
HUB: dict[str, dict[str, dict[str, list[dict[str, Any]]]]] = {
    "vqav2": {
        "default": {
            "validation": [
                {
                    "question_type": "what color is the",
                    "multiple_choice_answer": "red",
                    "answers": _vqa_answers(),
                    "image_id": image,
                    "answer_type": kind,
                    "question_id": number,
                    "question": question,
                }
                for image, number, kind, question in (
                    (42, 42000, "other", "What color is it?"),
                    (42, 42001, "yes/no", "Is it red?"),
                    (73, 73000, "other", "How many?"),
                )
            ]
        }
    },
    "gqa": {
        "testdev_balanced_instructions": {
            "testdev": [
                {
                    "id": number,
                    "imageId": "n161313",
                    "question": question,
                    "answer": answer,
                    "types": {"structural": kind, "semantic": "", "detailed": ""},
                }
                for number, question, answer, kind in (
                    ("201307251", "Is it overcast?", "no", "verify"),
                    ("201640614", "Who is wearing the dress?", "woman", "query"),
                )
            ]
        },
        "testdev_balanced_images": {"testdev": [{"id": "other"}, {"id": "n161313"}]},
    },
    "textvqa": {
        "default": {
            "validation": [
                {
                    "image_id": "003a8ae2ef43b901",
                    "question_id": number,
                    "question": question,
                    "answers": answers,
                    "ocr_tokens": ["DAKOTA", "DIGITAL"],
                    "set_name": "val",
                }
                for number, question, answers in (
                    (
                        34602,
                        "what is the brand of this camera?",
                        ["dakota"] * 8 + ["dakota digital", "clos culombu"],
                    ),
                    (34603, "what does the small white text spell?", ["copenhagen"] * 10),
                )
            ]
        }
    },
    "vizwiz": {
        "default": {
            "val": [
                {
                    "question_id": f"VizWiz_val_{number:08d}",
                    "question": "Ok. What's this?",
                    "answers": ["unanswerable"] * 7 + TEN[:3],
                    "category": "unanswerable",
                }
                for number in range(2)
            ]
        }
    },
    "pope": {
        "default": {
            "test": [
                {
                    "id": str(number),
                    "question_id": str(number),
                    "question": f"Is there a {thing} in the image?",
                    "answer": label,
                    "image_source": "COCO_val2014_000000310196",
                    "category": split,
                }
                for split in ("random", "popular", "adversarial")
                for number, thing, label in (
                    (1, "snowboard", "yes"),
                    (2, f"{split} car", "no"),
                )
            ]
        }
    },
    "mme": {
        "default": {
            "test": [
                {
                    "question_id": f"{category}/{name}.jpg",
                    "question": f"Is it {word}? Please answer yes or no.",
                    "answer": answer,
                    "category": category,
                }
                for category in ("count", "posters")
                for name in ("0001", "0002")
                for word, answer in (("one", "Yes"), ("two", "No"))
            ]
        }
    },
    "scienceqa_img": {
        "ScienceQA-IMG": {
            "test": [
                {
                    "question": "What is the name of the colony shown?",
                    "choices": choices,
                    "answer": answer,
                    "hint": hint,
                    "subject": "social science",
                }
                for choices, answer, hint in (
                    (["Maryland", "New Hampshire", "Rhode Island", "Vermont"], 1, ""),
                    (["It is dry.", "It is wet."], 0, "Figure: Shenandoah."),
                )
            ]
        }
    },
    "mmbench_en": {
        "en": {
            "dev": [
                _choice("one two three four", 241, "B", "Which is right?"),
                _choice("two three four one", 1000241, "A", "Which is right?"),
                _choice("yes no", 252, "A", 'Is "this"\nred?', hint="A hint."),
                _choice("no yes", 1000252, "B", 'Is "this"\nred?', hint="A hint."),
            ]
        }
    },
    "seedbench_image": {
        "default": {
            "test": [
                {
                    "answer": "A",
                    "choice_a": "One",
                    "choice_b": "Two",
                    "choice_c": "Three",
                    "choice_d": "Four",
                    "data_id": "1454426_2591111986",
                    "data_type": kind,
                    "question": "How many towels are in the image?",
                    "question_id": number,
                    "question_type_id": 5,
                }
                for kind, number in (("video", "v1"), ("image", "101669"))
            ]
        }
    },
    "ocrbench": {
        "default": {
            "test": [
                {"dataset": name, "question": question, "question_type": kind, "answer": answers}
                for name, question, kind, answers in (
                    (
                        "IC15_1811",
                        "what is written in the image?",
                        "Regular Text Recognition",
                        ["CENTRE"],
                    ),
                    (
                        "HME100k",
                        "Please write out the expression.",
                        "Handwritten Mathematical Expression Recognition",
                        [r"\frac { 1 } { 2 }"],
                    ),
                    (
                        "STVQA",
                        "What is the price?",
                        "Scene Text-centric VQA",
                        ["12", "twelve"],
                    ),
                )
            ]
        }
    },
    "docvqa": {
        "DocVQA": {
            "validation": [
                {
                    "questionId": number,
                    "question": question,
                    "question_types": kinds,
                    "docId": 279,
                    "ucsf_document_id": "xnbl0037",
                    "ucsf_document_page_no": "1",
                    "answers": answers,
                    "data_split": "val",
                }
                for number, question, kinds, answers in (
                    ("337", "what is the date in the letter?", ["handwritten", "form"], ["1/8/93"]),
                    (
                        "338",
                        "what is the contact person name?",
                        ["form"],
                        ["P. Carter", "p. carter"],
                    ),
                )
            ]
        }
    },
    "infovqa": {
        "InfographicVQA": {
            "validation": [
                {
                    "questionId": "98313",
                    "question": "Which social platform has heavy female audience?",
                    "answers": ["pinterest"],
                    "answer_type": ["single span"],
                    "image_url": "https://example.org/37313.jpg",
                    "operation/reasoning": [],
                    "ocr": "",
                    "data_split": "val",
                }
            ]
        }
    },
    "chartqa": {
        "default": {
            "test": [
                {"type": kind, "question": question, "answer": answer}
                for kind, question, answer in (
                    ("human_test", "How many food item is shown?", "14"),
                    ("human_test", "Is the sum above 60?", "Yes"),
                    ("augmented_test", "What was the share in 2011?", "31.67"),
                )
            ]
        }
    },
    "refcoco_rec": {
        "default": {
            "testA": [
                {
                    "question_id": "1",
                    "question": "Please carefully observe the area circled in the image.",
                    "answer": ["left man", "guy on the left"],
                    "bbox": [3.0, 2.0, 6.0, 4.0],
                    "file_name": "COCO_train2014_1.jpg",
                }
            ]
        }
    },
    "imagenet": {"default": {"validation": [{"label": 1}, {"label": 0}]}},
}
NO_PICTURE = {("gqa", "testdev_balanced_instructions")}


def write_hub(task: str, root: Path, picture: bytes | None = None) -> None:
    """Write the copy of a task's repository into ``root``, all its pictures the same.

    Args:
        task: the task.
        root: the folder.
        picture: an encoded picture; ``None``: a small red one.
    """
    shown = _picture() if picture is None else {"bytes": picture, "path": None}
    configs = []
    for config, splits in HUB[task].items():
        files = []
        for split, rows in splits.items():
            data = datasets.Dataset.from_list(rows)
            if (task, config) not in NO_PICTURE:
                listed = task == "seedbench_image"
                plain: Any = datasets.Image()
                column = [[shown] if listed else shown for _ in rows]
                feature = datasets.List(plain) if listed else plain
                data = data.add_column("image", column, feature=feature)
            path = f"{config}/{split}-00000-of-00001.parquet"
            (root / config).mkdir(parents=True, exist_ok=True)
            data.to_parquet(root / path)
            files.append({"split": split, "path": path})
        configs.append({"config_name": config, "data_files": files})
    (root / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
