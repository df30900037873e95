"""Figures of what was kept: followed patch by patch, drawn from plain data, and the command."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from llava_sparse import cli
from llava_sparse.drawing import COLOURS, Block, Stage, Trace, _arranged, _coloured, _rated, draw
from llava_sparse.evaluation import LoadedModel, ask
from llava_sparse.modeling.pruning_types import Selection
from llava_sparse.reference import SCENES
from llava_sparse.visualize import follow, trace, visualize

QUESTION = "Is there a dog in the image ?"
PICTURE = str(SCENES / "images" / "scene_000001.jpg")
BLACK = [Block(np.zeros((56, 56, 3), np.uint8), np.arange(16).reshape(4, 4))]
ALONE = (
    "llava-sparse: no --model is given, and the small reference model answers. It knows rendered scenes alone, and "
    "whether a thing is in them.\n"
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny.dense_model(), tiny.processor(), "tiny", True)


class Method:
    """What `follow` reads of a method."""

    def __init__(self, kind: str) -> None:
        self.place = "tower"
        self.encoder = self if kind == "encoder" else None


def selection(layer: int, kept: list[int], merge_map: list[int] | None = None, entered: int = 4) -> Selection:
    maps = None if merge_map is None else torch.tensor([merge_map])
    return Selection(layer, torch.tensor([kept]), torch.zeros(1, entered), maps)


def test_patches_are_followed_through_merged_tokens():
    """Token 4, merged from 1 and 2, is kept at the second stage and merged with 0 into 5 at the third."""
    stages = follow(
        [
            selection(1, [0, -1], [-1, 4, 4, -1]),
            selection(3, [0, 4]),
            selection(5, [-1, -1], [5, -1, -1, -1, 5]),
        ],
        Method("decoder"),
        entering=4,
    )
    assert [stage.owners.tolist() for stage in stages] == [[0, 4, 4, -1], [0, 4, 4, -1], [5, 5, 5, -1]]
    assert [stage.tokens for stage in stages] == [2, 2, 1]
    assert [stage.place for stage in stages] == [f"after decoder layer {layer}" for layer in (1, 3, 5)]
    assert stages[0].kept.tolist() == [True, False, False, False]
    assert not any(stage.unnumbered for stage in stages)


def test_cls_counts_where_it_goes_on():
    """One that no method numbers: number 6 of a decoder method behind, kept at first."""
    stages = follow(
        [selection(4, [2], [5, 4, -1, 5]), selection(1, [2, 4, 6]), selection(2, [2])], Method("encoder"), entering=4
    )
    assert [(stage.tokens, stage.unnumbered) for stage in stages] == [(4, 1), (3, 1), (1, 0)]
    assert [stage.owners.tolist() for stage in stages] == [[5, 4, 2, 5], [-1, 4, 2, -1], [-1, -1, 2, -1]]


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_trace_counts_what_the_model_has(strategy):
    loaded = LoadedModel(tiny.dense_model(vision_feature_select_strategy=strategy), tiny.processor(), "tiny", True)
    loaded.processor.vision_feature_select_strategy = strategy
    picture = tiny.image(0)
    dense = trace(loaded, [picture], QUESTION, "dense")
    assert (dense.stages, dense.raters, dense.tokens) == ((), (), tiny.PATCHES + (strategy == "full"))
    for method, budget in (("visionzip", 6), ("sparsevlm", 6)):
        found = trace(loaded, [picture], QUESTION, method, budget)
        model = loaded.with_method(method, budget)
        text = loaded.prompt(False).replace("{question}", QUESTION)
        inputs = loaded.processor(images=[picture], text=[text], return_tensors="pt")
        output = model(**inputs, output_selection=True)
        for stage, made in zip(found.stages, output.selection, strict=True):
            merged = 0 if made.merge_map is None else len(made.merge_map[made.merge_map >= 0].unique())
            cls = method == "visionzip"
            assert stage.tokens == (made.kept >= 0).sum() + merged + cls
        assert found.answer == ask(model, loaded.processor, picture, QUESTION, loaded.prompt(short_answer=False))


def test_raters_are_pieces_of_the_text(loaded):
    question = "What is\n<b>the</b> é dog ?"
    found = trace(loaded, [tiny.image(0)], question, "sparsevlm", 6)
    assert found.text == f" {question} ASSISTANT:"
    marked = [found.text[start:end] for start, end in found.raters]
    assert marked
    assert set(marked) <= set(found.text.split())
    assert trace(loaded, [tiny.image(0)], question, "visionzip", 6).raters == ()


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    return figure.findobj(Text)


def test_figure_shows_all_that_was_recorded():
    owners = np.array([0, 1, 16, 16, 17, *[-1] * 11])
    traces = [
        Trace("m", "Yes, a dog.", 16, BLACK, (Stage("after layer 7", owners, 1),), "Is there $x$ a dog?", ((12, 13),)),
        Trace("dense", "", 16, BLACK, (), "Is there $x$ a dog?", ()),
    ]
    figure = draw("Is there $\\frac{x$ a dog?", traces)
    shown = "\n".join(text.get_text() for text in texts(figure))
    for text in (
        "“Is there $\\frac{x$ a dog?”",
        "answer: Yes, a dog.",
        "answer: (empty)",
        "visual tokens: 16 → 5",
        "after layer 7\n2 kept + 2 merged + CLS",
        "merged (contextual",
        "dropped",
        "rater:",
    ):
        assert text in shown
    assert len(figure.axes) == 2
    assert not any(text.get_parse_math() for text in texts(figure))


def test_nothing_overlaps_or_leaves_the_figure():
    stages = tuple(Stage(f"after layer {i}", np.arange(16)) for i in range(3))
    question = "Is there a very big dog in the image? " * 8
    strip = [Block(BLACK[0].pixels, BLACK[0].numbers)] * 8
    traces = [
        Trace("sparse", "Yes. " * 200, 16, blocks, stages, question, ((0, 2), (9, 80))) for blocks in (BLACK, strip)
    ]
    figure = draw(question, traces)
    figure.draw_without_rendering()
    page = figure.bbox
    boxes = [artist.get_window_extent() for artist in figure.artists] + [axes.get_tightbbox() for axes in figure.axes]
    boxes.append(figure.legends[0].get_window_extent())
    for i, box in enumerate(boxes):
        assert box.x0 >= page.x0 and box.y0 >= page.y0 and box.x1 <= page.x1 and box.y1 <= page.y1
        for other in boxes[:i]:
            assert not (
                min(box.x1, other.x1) - max(box.x0, other.x0) > 2 and min(box.y1, other.y1) - max(box.y0, other.y0) > 2
            )


def test_pixels_of_a_drawing():
    """A block with newlines: kept tokens and newlines as they are, dropped ones pale, a merged one in its colour."""
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 0, 0)
    block = Block(pixels, np.array([[0, 1], [3, 4]]), np.array([2, 5]), share=0.5)
    figure = draw("?", [Trace("m", "", 6, [block], (Stage("here", np.array([0, -1, 2, -1, 6, -1])),), "", ())])
    whole, stage = (axes.images[0].get_array() for axes in figure.axes)
    assert whole.shape == stage.shape == (40, 50, 3)
    assert (whole[:, :40] == pixels / 255).all() and len(np.unique(whole[:, 40:])) == 1
    assert (stage[:20, :20] == 0).all() and (stage[:20, 40:] == whole[:20, 40:]).all()
    assert stage[:20, 20:40].min() > 0.8 and stage[20:, :20].min() >= 0.8 and stage[20:, 40:].min() > 0.8
    assert np.ptp(stage[30, 30]) > 0.2 and len(np.unique(stage[20:, 20:40].reshape(-1, 3), axis=0)) == 1
    assert figure.axes[0].get_title(loc="left") == "what the model sees, 50 % of it\n6 tokens"
    assert figure.axes[1].get_title(loc="left") == "here\n1 kept + 1 merged + 1 newline"


def test_blocks_stand_in_rows():
    corners, aspect = _arranged(BLACK * 8)
    assert len({y for _, y in corners}) == 2 and [x for x, _ in corners[:4]] == [x for x, _ in corners[4:]]
    assert 1.9 < aspect < 2.1
    assert _arranged(BLACK) == ([(0, 0)], 1)


def test_neighbouring_clusters_differ_in_colour():
    grid = 36 + np.add.outer(np.arange(6) // 2 * 3, np.arange(6) // 2)
    colours = _coloured([grid], 36)
    assert set(colours) == set(np.unique(grid).tolist())
    assert set(colours.values()) <= set(COLOURS)
    for a, b in zip(grid[:, 1:].ravel(), grid[:, :-1].ravel(), strict=True):
        assert a == b or colours[a] != colours[b]
    for a, b in zip(grid[1:].ravel(), grid[:-1].ravel(), strict=True):
        assert a == b or colours[a] != colours[b]


def test_words_are_marked_where_they_rate():
    text = "Is the dogs\tbig? ASSISTANT:"
    lines = _rated(Trace("m", "", 4, [], (), text, ((7, 10), (15, 16))), letters=200)
    assert lines == [
        [
            [("Is", False)],
            [("the", False)],
            [("dog", True), ("s", False)],
            [("big", False), ("?", True)],
            [("ASSISTANT:", False)],
        ]
    ]
    assert _rated(Trace("m", "", 4, [], (), text, ()), letters=200) == []


def test_visualize_needs_no_display(loaded):
    figure = visualize(loaded, tiny.image(0), QUESTION, ["dense", "visionzip", "sparsevlm"], 6)
    assert len(figure.axes) == (1 + 1) + (1 + 3)
    with pytest.raises(ValueError, match="did you mean 'visionzip'"):
        visualize(loaded, tiny.image(0), QUESTION, ["vision-zip"])


def test_a_budget_may_be_a_ratio(loaded):
    for method in ("visionzip", "sparsevlm"):
        ratio, count = (trace(loaded, [tiny.image(0)], QUESTION, method, budget) for budget in (0.375, 6))
        assert ratio.flow == count.flow
        for one, other in zip(ratio.stages, count.stages, strict=True):
            assert one.owners.tolist() == other.owners.tolist()
    assert len(visualize(loaded, tiny.image(0), QUESTION, ["dense", "visionzip"], 0.375).axes) == 1 + 1
    with pytest.raises(ValueError, match=r"`sparse_budget` must be an int in \[1, 16\], .* got 1\.5\."):
        visualize(loaded, tiny.image(0), QUESTION, ["visionzip"], 1.5)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        cli.main(["visualize", *map(str, arguments)])
    return exit.value.code, *capsys.readouterr()


def test_command(capsys, tmp_path):
    output = tmp_path / "a figure.png"
    quarter = run(
        capsys, PICTURE, "Is there a dog in the image?", "--methods", "visionzip", "--budget", 0.25, "--output", output
    )
    assert quarter == (0, "visionzip: Yes (576 → 144 visual tokens)\n", f"{ALONE}Figure: {output}\n")
    code, out, err = run(
        capsys, PICTURE, "Is there a dog in the image?", "--methods", "dense, visionzip", "--output", output
    )
    assert code == 0
    assert out == "dense: Yes (576 visual tokens)\nvisionzip: Yes (576 → 64 visual tokens)\n"
    assert err == f"{ALONE}Figure: {output}\n"
    with Image.open(output) as figure:
        assert figure.format == "PNG"
        assert figure.width > 800


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "2.0"], "or a float in (0, 1], a ratio of them, got 2.0."),
        (["--output", "figure.docx"], "figure.docx: a name that ends in .png, .svg, .pdf"),
        (["--output", "no-such-folder/figure.png"], "a file in a folder that exists is allowed"),
        (["--methods", "vision-zip"], "did you mean 'visionzip'?"),
    ],
)
def test_errors_are_one_line(capsys, options, message):
    code, out, err = run(capsys, PICTURE, "Is there a dog?", *options)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
