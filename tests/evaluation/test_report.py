"""Reports on results files: hostile names are text, damaged files are refused, what is missing is said."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.text import Text
from PIL import Image
from results import HOSTILE, PATCHES, RUNS, SCRIPT, THINGS, earlier_version, make_results, question, write

from llava_sparse import cli
from llava_sparse.evaluation import figures
from llava_sparse.evaluation.failures import failure_curves, load_objects
from llava_sparse.evaluation.report import report
from llava_sparse.evaluation.report_parts import THUMBNAIL, thumbnail
from llava_sparse.evaluation.results import read_results
from llava_sparse.evaluation.statistics import pack_kept
from llava_sparse.evaluation.tables import escape_markdown

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with results, their log, pictures, objects, and the report on them."""
    folder = tmp_path_factory.mktemp("results")
    results, log = make_results()
    write(folder, results, log)
    (folder / "pictures").mkdir()
    with open(folder / "objects.jsonl", "w", encoding="utf-8") as file:
        for n, name in enumerate(dict.fromkeys(answer["image"] for answer in results["methods"][0]["answers"])):
            Image.new("RGB", (60, 40), (200, 30 * n, 0)).save(folder / "pictures" / name, "JPEG")
            boxes = [
                {"name": "dog", "box": [10, 10, 60 + 20 * n, 60]},
                {"name": "cat", "box": [84, 84, 120, 140 + 10 * n]},
            ]
            file.write(json.dumps({"image": name, "objects": boxes}) + "\n")
    report(
        [folder / "run.json"],
        folder / "report.html",
        folder / "report.md",
        objects=folder / "objects.jsonl",
        images=folder / "pictures",
    )
    return folder


@pytest.fixture(scope="module")
def page(made) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(made) -> str:
    return (made / "report.md").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements of a page, its text, and the nesting of its tags."""

    VOID = ("meta", "img", "source", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_page_is_well_formed_and_inert(page):
    parsed = Page(page)
    assert parsed.open == []
    allowed = """html head meta title style body header nav ul li a main article section h1 h2 h3 h4 p div table caption
    thead tbody tr th td span strong details summary figure picture source img figcaption br"""
    assert {tag for tag, _ in parsed.elements} <= set(allowed.split())
    for _, attributes in parsed.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page and "@import" not in page
    (policy,) = [m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert ("td", SCRIPT) in parsed.texts
    assert ("th", HOSTILE) in parsed.texts


def test_page_is_accessible(page):
    parsed = Page(page)
    assert parsed.all("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in parsed.all("img"))
    assert len(parsed.all("caption")) == len(parsed.all("table")) > 8
    assert all(cell["scope"] in ("row", "col") for cell in parsed.all("th"))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"] for link in parsed.all("a")} <= {f"#{name}" for name in ids}


def test_page_has_every_section_and_number(page, made):
    results = read_results(made / "run.json")
    texts = [text for _, text in Page(page).texts]
    titles = "Scores|Aggregations side by side|Tests of every two runs|Precision, recall and calibration|"
    titles += "Failure modes|Where runs disagree|Questions|Settings and versions"
    for title in titles.split("|"):
        assert title in texts
    assert "Left out." not in page
    for entry in results["methods"]:
        average = entry["scores"]["average"]
        assert f"{100 * average['f1']:.1f}" in texts
        low, high = average["intervals"]["f1"]
        assert f"[{100 * low:.1f}, {100 * high:.1f}]" in texts
        assert f"{entry['scores']['unique']['roc_auc']:.3f}" in texts
    for pair in results["comparisons"]:
        assert f"{100 * pair['difference']:+.1f}" in texts
        assert f"{pair['kappa']:.2f}" in texts
    assert "row 3: <script>document.title='hacked'</script> cannot be decoded" in texts
    assert page.count("data:image/svg+xml") == 2 * (1 + 2 + 7)
    assert page.count("data:image/jpeg") == 6 * len(RUNS)


def test_figures_on_the_page_are_self_contained_and_stay_the_same(page, made, tmp_path):
    for encoded in re.findall(r"data:image/svg\+xml;base64,([^\"]*)", page):
        svg = base64.b64decode(encoded).decode()
        assert "<script" not in svg
        assert not re.findall(r"(?:href|src)=\"(?!#)", svg)
        assert not re.findall(r"url\((?!#)", svg)
    again = tmp_path / "again.html"
    report([made / "run.json"], again, objects=made / "objects.jsonl", images=made / "pictures")
    assert again.read_text(encoding="utf-8") == page


def chromium(page: Path, folder: Path) -> str:
    """The page as a browser has it after its scripts, if any, have run."""
    options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --virtual-time-budget=2000"""
    command = [CHROMIUM, *options.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed to open the page with")
def test_a_browser_runs_nothing(made, page, tmp_path):
    seen = chromium(made / "report.html", tmp_path)
    parsed = Page(seen)
    assert ("title", "Visual token pruning on POPE") in parsed.texts
    assert len(parsed.all("table")) == len(Page(page).all("table"))
    assert not parsed.all("script")

    injected = "<script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\"></body>"
    for name, text in {"kept": page, "open": re.sub(r"<meta http-equiv[^>]*>", "", page)}.items():
        (tmp_path / f"{name}.html").write_text(text.replace("</body>", injected), encoding="utf-8")
    assert "<title>hacked</title>" in chromium(tmp_path / "open.html", tmp_path), "the check itself does not work"
    assert "<title>Visual token pruning on POPE</title>" in chromium(tmp_path / "kept.html", tmp_path)


def test_markdown_shows_names_as_they_are(markdown):
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(markdown)
    parsed = Page(html)
    allowed = "h1 h2 h3 p table thead tbody tr th td ul li strong"
    assert {tag for tag, _ in parsed.elements} <= set(allowed.split())
    assert ("td", HOSTILE) in parsed.texts
    assert ("td", SCRIPT) in parsed.texts
    assert ("li", "- 1. `row` | 4") in parsed.texts
    assert any(text.startswith(question(THINGS[3])) for _, text in parsed.texts)


@pytest.mark.parametrize(
    "text", ["a|b", "`x`", "<b>", "*x* _y_ __z__", "[a](b) [a]: c ![i](j)", r"\| \\", "~~a~~", "&lt;", "a_b [1, 2]"]
)
def test_markdown_escapes(text):
    for template in (f"{escape_markdown(text)}\n", f"| a |\n| - |\n| {escape_markdown(text)} |\n"):
        parsed = Page(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(template))
        assert text in [shown for _, shown in parsed.texts]
    assert "\n" not in escape_markdown("a\nb")


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda f, r: f.pop("log"), ["There is no log of answers", "--objects names"]),
        (lambda f, r: f["log"][0]["settings"].update(model="another"), ["is of other settings than the results"]),
        (lambda f, r: f["log"].pop(), [f"does not have all answers of {HOSTILE}"]),
        (lambda f, r: r.pop("comparisons"), ["The file has no comparisons"]),
        (
            lambda f, r: f.update(results=earlier_version(r)),
            ["Intervals:", "no scores; --answer-mode", "All rows as one"],
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path, change, reasons):
    results, log = make_results()
    files = {"results": results, "log": copy.deepcopy(log)}
    change(files, results)
    path = write(tmp_path, files["results"], files.get("log"))
    report([path], markdown=tmp_path / "report.md")
    text = Page(MarkdownIt("commonmark").enable("table").render((tmp_path / "report.md").read_text()))
    said = " ".join(shown for _, shown in text.texts if shown.startswith("Left out."))
    for reason in [*reasons, "The objects in these pictures are not known", "Pictures: their folder is not known"]:
        assert reason.lower() in said.lower()


def test_runs_that_do_not_say_how_many_tokens_they_used(tmp_path):
    results, log = make_results()
    results["methods"][2]["visual_tokens"] = None
    report([write(tmp_path, results, log)], tmp_path / "report.html", tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    tokens = [found[1] for line in lines if (found := re.search(r"\| [^|]* / [^|]* / (–|[\d.]+) \|", line))]
    assert tokens == ["16", "5", "–"]
    axes = figures.accuracy_against_tokens(results["methods"]).axes[0]
    assert len(axes.containers) == 2


@pytest.mark.parametrize("kept", ["none", [3], ["zz"], ["ff"]])
def test_invalid_masks_are_refused(tmp_path, kept):
    results, log = make_results()
    log[-1]["kept"] = kept
    with pytest.raises(ValueError, match=r"run\.answers\.jsonl, (line 97, answer\.|run .*: )kept"):
        report([write(tmp_path, results, log)], markdown=tmp_path / "report.md")


def test_thumbnails_pale_what_goes(tmp_path):
    Image.new("RGB", (80, 40), (200, 0, 0)).save(tmp_path / "red.png")
    first, second = np.zeros(PATCHES, bool), np.zeros(PATCHES, bool)
    first[:8] = second[:4] = True
    uri = thumbnail(tmp_path, "red.png", [first, second])
    picture = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (THUMBNAIL, THUMBNAIL)
    whole, half, gone = (np.array(picture.getpixel((80, y))) for y in (20, 60, 140))
    assert np.abs(whole - (200, 0, 0)).max() < 12
    assert 60 < half[1] < 160
    assert gone.min() > 190
    for name in ("../red.png", "none.png"):
        with pytest.raises(ValueError, match="image"):
            thumbnail(tmp_path / "inner" if name.startswith("..") else tmp_path, name, [])


def drawn(figure) -> list[str]:
    figure.draw_without_rendering()
    texts = figure.findobj(Text)
    assert not any(text.get_parse_math() for text in texts if text.get_text() in RUNS)
    return [text.get_text() for text in texts]


def test_figures_have_what_they_are_given(made):
    entries = read_results(made / "run.json")["methods"]
    entries[2].name = r"$\frac{x$@4"
    objects = load_objects(made / "objects.jsonl")
    kept = {(a["image"], a["question"]): [pack_kept(np.arange(PATCHES) < 6)] for a in entries[0]["answers"]}
    curves = [failure_curves(e, kept if n else None, objects, resamples=20) for n, e in enumerate(entries)]

    axes = figures.accuracy_against_tokens(entries).axes[0]
    points = [container.lines[0].get_xydata()[0].tolist() for container in axes.containers]
    assert [y for _, y in points] == [e["scores"]["average"]["accuracy"] for e in entries]
    assert [x for x, _ in points] == pytest.approx([e["visual_tokens"] for e in entries], rel=0.03)
    for figure in (
        figures.precision_recall(entries),
        figures.calibration_curve(entries, dark=True),
        figures.failure(curves),
        figures.failure(curves, ["clutter"], rate="false_positive_rate"),
    ):
        assert {"dense", "visionzip@4", r"$\frac{x$@4"} <= set(drawn(figure))
    for line, entry in zip(figures.precision_recall(entries).axes[0].lines[1::2], entries, strict=True):
        unique = entry["scores"]["unique"]
        assert line.get_xydata().tolist() == [[unique["recall"], unique["precision"]]]
    assert len(figures.failure(curves).axes) == 4
    recall = figures.failure(curves, ["clutter"]).axes[0].containers[0].lines[0].get_ydata()
    assert recall.tolist() == [part["rate"] for part in curves[0]["recall"]["clutter"]]
    for by in ("stage", "size"):
        assert "dense" not in drawn(figures.survival(curves, by))
    light, dark = (figures.failure(curves, ["size"], dark=dark).get_facecolor() for dark in (False, True))
    assert sum(light[:3]) > 2.5 > 1 > sum(dark[:3])


@pytest.mark.parametrize("letters", [3, 9, 12, 20, 40])
def test_legends_stay_inside(letters):
    entry = {"method": "m", "visual_tokens": 64.0, "average": {"accuracy": 0.5}}
    names = [f"{n:x}" * letters for n in range(8 if letters > 12 else 16)]
    figure = figures.accuracy_against_tokens([entry | {"name": name} for name in names])
    figure.draw_without_rendering()
    legend = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= legend.x0 and legend.x1 <= figure.bbox.x1
    assert figure.axes[0].get_tightbbox().y0 >= legend.y1


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main(["report", *map(str, arguments)])
    return exit.value.code, *capsys.readouterr()


def test_command(capsys, tmp_path, monkeypatch):
    results, log = make_results()
    path = write(tmp_path, {**results, "methods": results["methods"][:1], "comparisons": []}, log)
    monkeypatch.chdir(tmp_path)
    assert run(capsys, path) == (0, "", "Report: report.html\n")
    assert "There is a single run." in Path("report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such-file.json"], "no-such-file.json: no such file or folder."),
        ([__file__], "no JSON file"),
        ([__file__, "--html", "run.json"], "run.json: a name that ends in .html or .htm is allowed"),
        ([__file__, "--markdown", "no-such-folder/report.md"], "a file in a folder that exists is allowed"),
        ([__file__, "--images", "no-such-folder"], "no-such-folder: no such folder of pictures"),
    ],
)
def test_errors_are_one_line(capsys, options, message):
    code, out, err = run(capsys, *options)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
