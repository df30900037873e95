"""Pictures and tables that are damaged, wrong, or lead out of their folder: which message refuses them."""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pope_tables import columns, encoded, last, stored_as, table, with_metadata

from llava_sparse.evaluation import load_pope
from llava_sparse.evaluation.tasks import rows
from llava_sparse.evaluation.tasks.pope import SPLITS


@pytest.fixture
def folder(tmp_path) -> Path:
    """A valid question a split about one picture, and room for another in the split random."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    for split in SPLITS:
        ask(tmp_path, split, "a.png")
    return tmp_path


def ask(folder: Path, split: str, *images: str) -> None:
    rows = [{"question_id": n, "image": name, "text": "Is it?", "label": "yes"} for n, name in enumerate(images)]
    (folder / f"tiny_pope_{split}.json").write_text("\n".join(json.dumps(row) for row in rows))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises many pixels and holds a hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def rotated(file: Path) -> None:
    image = Image.new("RGB", (30, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)


@pytest.mark.parametrize(
    ("name", "save", "size"),
    [
        ("cmyk.jpg", lambda file: Image.new("CMYK", (9, 8)).save(file), (9, 8)),
        ("palette.png", lambda file: Image.new("P", (9, 8)).save(file), (9, 8)),
        ("alpha.png", lambda file: Image.new("LA", (9, 8)).save(file), (9, 8)),
        ("one bit.png", lambda file: Image.new("1", (9, 8)).save(file), (9, 8)),
        ("still.gif", lambda file: Image.new("RGB", (9, 8)).save(file), (9, 8)),
        (
            "moving.gif",
            lambda file: Image.new("L", (9, 8)).save(file, save_all=True, append_images=[Image.new("L", (9, 8), 9)]),
            (9, 8),
        ),
        ("pixel.png", lambda file: Image.new("RGB", (1, 1)).save(file), (1, 1)),
        ("rotated.jpg", rotated, (10, 30)),
        ("no suffix", lambda file: Image.new("RGB", (9, 8)).save(file, "PNG"), (9, 8)),
    ],
)
def test_pictures_of_all_kinds(folder, name, save, size):
    save(folder / "images" / name)
    ask(folder, "random", name)
    assert load_pope(folder)[0]["image"].convert("RGB").size == size


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda file: file.write_bytes(png_header(30_000, 30_000)), "has more than the 89,478,485 pixels that Pillow"),
        (lambda file: file.write_bytes(png_header(10_000, 10_000)), "has more than the 89,478,485 pixels that Pillow"),
        (lambda file: file.write_bytes(png_header(30_000, 1)), "is 30,000 × 1 pixels; sides of at most 200 times"),
        (lambda file: Image.new("I;16", (9, 9)).save(file), r"has more than 8 bits a channel \(mode I;16\)"),
        (lambda file: Image.new("F", (9, 9)).save(file, "TIFF"), r"has more than 8 bits a channel \(mode F\)"),
        (lambda file: Image.new("RGB", (9, 9)).save(file, "EPS"), "cannot be decoded"),
        (lambda file: Image.new("RGB", (9, 9)).save(file, "PPM"), "cannot be decoded"),
        (lambda file: file.write_bytes(b""), "cannot be decoded"),
        (lambda file: file.mkdir(), "does not exist"),
    ],
)
def test_refused_pictures(folder, save, message):
    save(folder / "images" / "b.png")
    ask(folder, "random", "a.png", "b.png")
    with pytest.raises(ValueError, match=f"tiny_pope_random.json, row 2: image 'b.png' {message}"):
        load_pope(folder)


def test_each_picture_is_decoded_once(folder, monkeypatch):
    decoded = []
    read = rows.read_picture
    monkeypatch.setattr(rows, "read_picture", lambda picture, *name: decoded.append(picture) or read(picture))
    load_pope(folder)
    assert [file.name for file in decoded] == ["a.png"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (last("answer", "perhaps"), "row 6: label 'perhaps' is neither"),
        (last("category", "easy"), "row 6: category 'easy'; allowed"),
        (last("question", None), "row 6: question None: text that is not empty is allowed"),
        (last("question_id", "1"), "row 6: question_id 1 is already that of x.parquet, row 5"),
        (last("image", None), "row 6: the picture is missing; pictures whose bytes are in the table"),
        (last("image", {"bytes": None, "path": "/etc/passwd"}), "row 6: the picture is the path '/etc/passwd'; "),
        (last("image", {"bytes": None, "path": "x.png"}), "row 6: the picture is the path 'x.png'"),
        (last("image", {"bytes": encoded()[:40], "path": None}), "row 6: image 'COCO.*' cannot be decoded"),
        (
            last("image", {"bytes": encoded("blue"), "path": None}),
            "row 6: image_source 'COCO.*' is another picture in an",
        ),
        (columns(image=["a.png"] * 6), r"the column 'image' holds Value\('string'\); pictures with their bytes are"),
        (columns(answer=[1, 0] * 3), r"the column 'answer' holds Value\('int64'\); text is allowed"),
        (columns(question=[["?"]] * 6), "the column 'question' holds List"),
        (
            columns(category=["random"] * 2 + ["popular"] * 4, question_id=list("123456")),
            "no questions of the split adv",
        ),
        ({key: value[:0] for key, value in columns().items()}, "there are no questions in 1 parquet files"),
        (
            {key: value for key, value in columns().items() if key != "answer"},
            "the column 'answer' is missing; needed: q",
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_refused_parquet(tmp_path, changed, message, streaming):
    pq.write_table(pa.table(changed), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        list(load_pope(tmp_path, streaming=streaming))
    if "row 6" in message and "row 6: category" not in message:
        messages: list[str] = []
        assert len(list(load_pope(tmp_path, streaming=streaming, on_bad=messages.append))) == 5
        assert len(messages) == 1


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing else"])
def test_what_is_no_parquet_file(tmp_path, content):
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet: no parquet file that can be read"):
        load_pope(tmp_path)


def test_saved_tables_outside_of_their_folder(tmp_path):
    source = stored_as("saved", tmp_path / "x")
    state = json.loads((source / "state.json").read_text())
    shutil.move(source / state["_data_files"][0]["filename"], tmp_path / "outside.arrow")
    state["_data_files"][0]["filename"] = "../outside.arrow"
    (source / "state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"outside\.arrow' is outside of the folder"):
        load_pope(source)
    (source / "state.json").write_text("{")
    with pytest.raises(ValueError, match="nothing that save_to_disk has written"):
        load_pope(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file_name": "../secret.png"}, "image '../secret.png' leaves .*x; only files inside it are allowed"),
        ({"file_name": "/etc/passwd"}, "image '/etc/passwd' leaves"),
        ({"file_name": "sub/link.png"}, "image 'sub/link.png' leaves"),
        ({"file_name": 7}, "image 7: text that is not empty is allowed"),
        ({"file_name": "sub/b.png"}, "image_source 'COCO.*' is another picture in an earlier row"),
        ({"category": "easy"}, "category 'easy'; allowed"),
        ({"question": "\ud800"}, "question .*: text that is not empty is allowed"),
    ],
)
def test_refused_metadata(tmp_path, changes, message):
    source = with_metadata(tmp_path / "x", "jsonl", [*table().to_list(), {**table()[5], "question_id": "3", **changes}])
    Image.new("RGB", (8, 6), "blue").save(tmp_path / "secret.png")
    Image.new("RGB", (8, 6), "blue").save(source / "sub" / "b.png")
    (source / "sub" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=f"metadata.jsonl, row 7: {message}"):
        load_pope(source)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"a", "row 8: category None; allowed"),
        (b"sub/a.png,3,q,no,a,random,more", "row 8: there are more cells than columns"),
        (b'sub/a.png,3,"q,no,a,random', "after row 7: invalid CSV"),
        (b"\xe9", "the file is not UTF-8 text"),
    ],
)
def test_refused_csv(tmp_path, line, message):
    source = with_metadata(tmp_path / "x", "csv", table().remove_columns("id").to_list())
    with (source / "metadata.csv").open("ab") as text:
        text.write(line)
    with pytest.raises(ValueError, match=f"metadata.csv.*{message}"):
        load_pope(source)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=60), header=st.booleans())
def test_whatever_a_csv_file_holds(tmp_path, content, header):
    file = tmp_path / "x" / "metadata.csv"
    if not file.exists():
        with_metadata(file.parent, "csv", table().remove_columns("id").to_list())
        file.rename(tmp_path / "whole.csv")
    start = (tmp_path / "whole.csv").read_bytes().split(b"\r\n")[0] + b"\r\n"
    file.write_bytes(start * header + content)
    with pytest.raises(ValueError, match=r"metadata\.csv"):
        load_pope(file.parent)
