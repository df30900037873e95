"""Results files as a page that needs nothing else, and as Markdown. Everything from a file is text, never markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llava_sparse.reference import SCENES

from .analysis import Pair, load_objects, read_log
from .answer_log import log_path
from .report import check_output
from .report_parts import Article, Source
from .report_sections import article
from .results_file import read_results, results_files
from .statistics import unpack_kept

REFERENCE = "reference"
# What Markdown, GitHub's too, reads as more than the character itself: anywhere, and where a line begins.
_MARKDOWN = re.compile(r"([\\`*|~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=\bwww)\.)")
_LINE_START = re.compile(r"^(\d*)(?=[#+=.):-])")
_HTML_NAMES, _MARKDOWN_NAMES = (".html", ".htm"), (".md", ".markdown")


def report(
    paths: Sequence[str | Path],
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    *,
    objects: str | Path | None = None,
    images: str | Path | None = None,
) -> None:
    """Writes a report on results files.

    Args:
        paths: results files, or folders of them.
        html, markdown: the files to write; at least one.
        objects: boxes of the objects in the pictures, as `load_objects` reads them. Those of the reference set are
            known.
        images: folder of the pictures. That of the reference set is known.

    Raises:
        ValueError: for files that are no results or are damaged; for objects or pictures that do not fit them.
        OSError: for files that cannot be read or written.
    """
    for path, endings in ((html, _HTML_NAMES), (markdown, _MARKDOWN_NAMES)):
        if path is not None:
            if Path(path).suffix.lower() not in endings:
                raise ValueError(f"{path}: a name that ends in {' or '.join(endings)} is allowed.")
            check_output(path)
    if images is not None and not Path(images).is_dir():
        raise FileNotFoundError(f"{images}: no such folder of pictures.")
    articles = [article(_source(path, objects, images)) for path in results_files(paths)]
    for path, render in ((html, render_html), (markdown, render_markdown)):
        if path is not None:
            # Lone surrogates, which JSON allows in strings, have no other form.
            Path(path).write_bytes(render(articles).encode("utf-8", "backslashreplace"))


def render_html(articles: Sequence[Article]) -> str:
    """A page without scripts and remote resources."""
    return _environment().get_template("report.html").render(articles=articles)


def render_markdown(articles: Sequence[Article]) -> str:
    """Tables and texts; figures and pictures are the page's."""
    text = _environment().get_template("report.md").render(articles=articles)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("llava_sparse.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = escape_markdown
    environment.filters["line"] = lambda text: Markup(_LINE_START.sub(r"\1\\", escape_markdown(text)))
    return environment


def escape_markdown(text: Any) -> Markup:
    """Text on one line that Markdown shows as it is, in tables too, but not where a line begins."""
    return Markup(_MARKDOWN.sub(r"\\\1", escape(" ".join(str(text).split()), quote=False)))


def _source(path: Path, objects: str | Path | None, images: str | Path | None) -> Source:
    results = read_results(path)
    kept, no_kept = _kept(path, results)
    if results["settings"]["dataset"] == REFERENCE:
        objects = SCENES / "objects.jsonl" if objects is None else objects
        images = SCENES / "images" if images is None else images
    return Source(
        path.name,
        results,
        kept,
        no_kept,
        None if objects is None else load_objects(objects),
        None if images is None else Path(images),
    )


def _kept(path: Path, results: dict[str, Any]) -> tuple[dict[str, dict[Pair, list[str]]], str]:
    """Masks of the runs that the log beside the results has in full, and why others are missing."""
    log = log_path(path)
    if not log.is_file():
        return {}, f"there is no log of answers, {log.name}, beside the results."
    header, runs = read_log(log)
    if header.get("settings") != results["settings"]:
        return {}, f"{log.name} is of other settings than the results."
    kept: dict[str, dict[Pair, list[str]]] = {}
    for entry in results["methods"]:
        pairs = {(answer["image"], answer["question"]) for answer in entry["answers"]}
        lines = runs.get(entry["name"], {})
        if "patches" in entry and pairs <= lines.keys():
            kept[entry["name"]] = {pair: _masks(lines[pair], entry["patches"], log) for pair in pairs}
    missing = [entry["name"] for entry in results["methods"] if entry["name"] not in kept]
    return kept, f"{log.name} does not have all answers of {', '.join(missing)}." if missing else ""


def _masks(line: dict[str, Any], patches: int, log: Path) -> list[str]:
    masks = line.get("kept", [])
    if not isinstance(masks, list):
        raise ValueError(f"{log}, run {line['run']!r}: kept {masks!r}; a list of masks is allowed.")
    try:
        for mask in masks:
            unpack_kept(mask, patches)
    except ValueError as error:
        raise ValueError(f"{log}, run {line['run']!r}: {error}") from error
    return masks
