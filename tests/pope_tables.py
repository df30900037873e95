"""Two questions a split about one picture, in every form that is loaded."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import datasets
from PIL import Image

from llava_sparse.evaluation.tasks.pope import FEATURES, SPLITS


def encoded(color: str = "red", kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(content, kind)
    return content.getvalue()


def columns(**changes) -> dict[str, list]:
    """Two questions a split, in the order of the Hub, about one picture."""
    return {
        "question_id": ["1", "2"] * 3,
        "question": ["Is there a dog in the image?", "Is there a cat in the image?"] * 3,
        "answer": ["yes", "no"] * 3,
        "image_source": ["COCO_val2014_000000310196"] * 6,
        "image": [{"bytes": encoded(), "path": None}] * 6,
        "category": [split for split in ("adversarial", "popular", "random") for _ in range(2)],
        **changes,
    }


def last(column: str, value: object) -> dict[str, list]:
    """The columns, with another value in their last row, which is in the split random."""
    return columns(**{column: [*columns()[column][:-1], value]})


def table(**changes) -> datasets.Dataset:
    features = {"id": datasets.Value("string"), **FEATURES}
    return datasets.Dataset.from_dict(
        {"id": list("abcdef"), **columns(**changes)}, features=datasets.Features(features)
    )


def with_metadata(folder: Path, kind: str, rows: list[dict]) -> Path:
    """A folder as `imagefolder` has it."""
    (folder / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "sub" / "a.png")
    rows = [{key: value for key, value in row.items() if key != "image"} for row in rows]
    entries = [{"file_name": "sub/a.png", **row} for row in rows]
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    else:
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as text:
            writer = csv.DictWriter(text, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    return folder


def stored_as(kind: str, folder: Path) -> Path:
    """The table in one of the forms that are loaded."""
    if kind == "saved":
        table().save_to_disk(str(folder))
    elif kind == "saved splits":
        parts = {s: table().filter(lambda name, s=s: name == s, input_columns="category") for s in SPLITS}
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    elif kind in ("jsonl", "csv"):
        with_metadata(folder, kind, table().to_list())
    else:
        folder.mkdir()
        table().select(range(3)).to_parquet(folder / "data [1].parquet")
        table().select(range(3, 6)).to_parquet(folder / "data [2].parquet")
    return folder
