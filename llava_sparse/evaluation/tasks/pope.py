"""POPE: questions from any of its sources, whole or in part, and its rule for answers (arXiv 2305.10355)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import datasets

from llava_sparse.evaluation.files import Report, refuse
from llava_sparse.evaluation.statistics import YES_NO
from llava_sparse.metrics.pope.pope import parse_answer
from llava_sparse.reference import SCENES

from . import Task, register_task
from .questions import Labels, Questions, ReportOnce
from .rows import FEATURES
from .sources import METADATA_FILES, Files, Source, Streams, Tables, from_path

__all__ = ["FEATURES", "HUB_DATASET", "SPLITS", "Pope", "load_pope"]

SPLITS = ("random", "popular", "adversarial")
HUB_DATASET = "lmms-lab/POPE"
CONFIGS = ("default", "Full")
# Columns, and the keys under which an official file holds them.
OFFICIAL = {
    "question_id": "question_id",
    "image_source": "image",
    "image": "image",
    "question": "text",
    "answer": "label",
}
ALLOWED = (
    f"a dataset is 'reference', '{HUB_DATASET}' or a folder with images/ and *_pope_{{{','.join(SPLITS)}}}.json, with "
    f"{' or '.join(METADATA_FILES)}, with parquet files, or written by save_to_disk"
)

# LLaVA's scripts score an older version of the random split, which does not have these questions (all of them are about
# absent objects; docs/data.md says how they were found). The digest is that of their images and texts.
DROPPED_BY_LLAVA = """
    18 40 62 70 72 76 104 114 126 180 192 234 250 272 276 332 366 372 498 502 520 560 570 574 632 664 718 722 724
    820 868 922 958 1004 1014 1060 1144 1194 1248 1264 1318 1342 1398 1406 1472 1474 1508 1538 1630 1642 1660 1704
    1718 1794 1818 1866 1888 1932 1942 1944 1968 2010 2028 2126 2130 2154 2216 2222 2256 2262 2322 2358 2412 2450
    2474 2558 2616 2658 2688 2698 2746 2778 2786 2828 2844 2854 2880 2884 2912 2988
"""
DROPPED_DIGEST = "9a41ca4e50fb7dc7df31b69fff2229d3a2f4b82fdeaa5bbd9aff4dd6f8e8f80b"


@register_task
class Pope(Task):
    """Is there an object in the picture? Yes or no."""

    name = "pope"
    title = "POPE"
    measure = YES_NO
    labels = ("yes", "no")
    choices = ("Yes", "No")
    hard_split = "adversarial"

    def load(
        self, source: str | Path, limit: int | None, *, on_bad: Report | None, **subset: Any
    ) -> datasets.Dataset | datasets.IterableDataset:
        """As `load_pope`."""
        return load_pope(source, limit, on_bad=on_bad, **subset)

    def parse(self, text: str, label: str) -> str:
        """Yes, unless the first sentence says no: the official rule."""
        return parse_answer(text)

    def asked(self, question: str) -> str | None:
        """The object of "Is there a dog in the image?"."""
        found = re.fullmatch(r"Is there an? (.+) in the image\?", question)
        return None if found is None else found[1]


def load_pope(
    source: str | Path = "reference",
    limit: int | None = None,
    *,
    config: str | None = None,
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    split: str | Sequence[str] | None = None,
    ids: str | Path | None = None,
    variant: str | None = None,
    streaming: bool = False,
    on_bad: Report | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads POPE's questions.

    Args:
        source: `"reference"` (the embedded scenes), `"lmms-lab/POPE"` (from the Hub), a parquet file, or a folder: with
            `images/` and the official `*_pope_random.json`, `*_pope_popular.json`, `*_pope_adversarial.json`; with
            `metadata.jsonl` or `metadata.csv`; with parquet files; or written by `save_to_disk`.
        limit: questions per split, spread evenly over the file and over both labels; None or more than there are: all.
        config: of the dataset on the Hub: `"default"` or `"Full"`; of a folder with the official files of several
            sets of pictures, which: `"coco"`, `"aokvqa"` or `"gqa"`.
        annotations, images: instead of `source`, a folder with the official question files, and one with the pictures.
        split: one or several of `SPLITS`; None for all.
        ids: a text file with the ids of questions, one a line: `random/12`, `random 12`, or `12` for the questions of
            that id in all splits that are loaded.
        variant: `"8910"` for the questions that LLaVA's scripts score: without 90 of the random split.
        streaming: whether rows are read, and checked, as they are drawn.
        on_bad: called with the message of every invalid row, once, which is then left out; None: it is an error.

    Returns:
        Questions with columns question_id, question, answer ("yes" or "no"), image_source, image (decoded when it is
        accessed) and category (the split), in the order of `SPLITS`. Of several subsets, variant comes first, then
        ids, then limit.

    Raises:
        ValueError: for invalid data, naming file and row; for a split that nothing is left of; for ids that are not
            found; for invalid arguments. When streaming, invalid rows raise it as they are drawn.
        FileNotFoundError: if a folder or file does not exist.
        ConnectionError: if the Hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: a positive number of questions per split is allowed.")
    splits = _splits(split)
    opened = _open(source, config, annotations, images, splits, streaming)
    questions = Questions(opened, splits, Pope.labels, refuse if on_bad is None else ReportOnce(on_bad))
    if (limit, ids, variant) != (None, None, None):
        labels = questions.labels()
        if variant is not None:
            _drop_from(labels, variant, questions)
        questions.choose(labels, None if ids is None else Path(ids), limit)
        empty = [name for name in splits if not (questions.chosen or {})[name]]
        if split is not None and empty:
            raise ValueError(f"{ids}: there are no ids of the split {empty[0]}, which was asked for.")
    return questions.load(streaming)


def _splits(split: str | Sequence[str] | None) -> list[str]:
    asked = SPLITS if split is None else [split] if isinstance(split, str) else list(split)
    unknown = [name for name in asked if name not in SPLITS]
    if unknown or not asked:
        raise ValueError(f"split={split!r}: one or several of {', '.join(SPLITS)} are allowed.")
    return [name for name in SPLITS if name in asked]


def _open(
    source: str | Path,
    config: str | None,
    annotations: str | Path | None,
    images: str | Path | None,
    splits: Sequence[str],
    streaming: bool,
) -> Source:
    if config is not None and source != HUB_DATASET and (config in CONFIGS or (source, images) == ("reference", None)):
        raise ValueError(f"config={config!r}: only {HUB_DATASET} has configurations.")
    if annotations is None and images is None:
        if source == HUB_DATASET:
            return _from_hub(config, splits, streaming)
        path = SCENES if source == "reference" else Path(source)
        if path.is_dir() and any(path.glob("*_pope_*.json")):
            return _from_annotations(path, path.resolve() / "images", splits, config)
        if config is not None:
            raise ValueError(f"config={config!r}: {path} has no official question files to choose from.")
        return from_path(path, splits, SPLITS, streaming, ALLOWED)
    if annotations is None or images is None:
        raise ValueError("annotations and images: both folders are needed, or neither.")
    if source != "reference":
        raise ValueError(f"annotations={str(annotations)!r} and source={str(source)!r}: one of the two is allowed.")
    for folder in (annotations, images):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"{folder}: no such folder.")
    return _from_annotations(Path(annotations), Path(images).resolve(), splits, config)


def _from_hub(config: str | None, splits: Sequence[str], streaming: bool) -> Source:
    """The dataset on the Hub."""
    if config not in (None, *CONFIGS):
        raise ValueError(f"config={config!r}: {HUB_DATASET} has the configurations {' and '.join(CONFIGS)}.")
    options = {"streaming": True} if streaming else {}
    wanted = [(f" {split}", config, split) for split in splits] if config == "Full" else [("", None, "test")]
    try:
        tables = [
            (f"{HUB_DATASET}{name}", datasets.load_dataset(HUB_DATASET, *filter(None, [of]), split=part, **options))
            for name, of, part in wanted
        ]
    except OSError as error:
        raise ConnectionError(
            f"The dataset {HUB_DATASET} cannot be loaded from the Hub: is there a network? "
            "--dataset reference and --dataset FOLDER need none."
        ) from error
    return (Streams if streaming else Tables)(tables, SPLITS)


def _from_annotations(folder: Path, images: Path, splits: Sequence[str], config: str | None) -> Source:
    """The official question files of a folder, with their pictures in another."""
    return Files({split: _question_file(folder, split, config) for split in splits}, OFFICIAL, images, SPLITS)


def _question_file(folder: Path, split: str, config: str | None) -> Path:
    """`coco_pope_random.json`; those about A-OKVQA and GQA are called `aokvqa_pope_seem_random.json`, too."""
    files = sorted([*folder.glob(f"*_pope_{split}.json"), *folder.glob(f"*_pope_seem_{split}.json")])
    files = [file for file in files if config is None or file.name.startswith(f"{config}_")]
    if not files:
        which = "*" if config is None else config
        raise FileNotFoundError(f"{folder}: there is no {which}_pope_{split}.json (needed: {', '.join(SPLITS)}).")
    if len(files) > 1:
        raise ValueError(
            f"{folder}: {files[0].name} and {files[1].name} are both the split {split}; one is allowed, or config="
            f"{files[0].name.partition('_')[0]!r} (--config) chooses."
        )
    return files[0]


def _drop_from(labels: Labels, variant: str, questions: Questions) -> None:
    """Drops from the official questions what a variant leaves out.

    Raises:
        ValueError: for an unknown variant, and if the random split is not loaded or not the official one.
    """
    if variant != "8910":
        raise ValueError(f"variant={variant!r}: '8910' is allowed.")
    if "random" not in labels:
        raise ValueError("variant='8910' drops questions of the split random, which is not loaded.")
    dropped = DROPPED_BY_LLAVA.split()
    told: dict[str, str] = {}
    for row in questions.valid_texts("random"):
        if row.values["question_id"] in dropped:
            image = PurePath(row.values["image_source"]).stem
            told[row.values["question_id"]] = f"{image}\t{row.values['question']}\n"
    if hashlib.sha256("".join(told.get(key, "") for key in dropped).encode()).hexdigest() != DROPPED_DIGEST:
        raise ValueError(
            f"{questions.source.name('random')}: variant='8910' is known for the official questions about COCO only; "
            "these are others. List the wanted ones in a file (ids)."
        )
    for key in dropped:
        del labels["random"][key]
