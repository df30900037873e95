"""Frames of videos, and asking about them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from llava_sparse.evaluation import ask
from llava_sparse.evaluation.videos import even, read_frames


def brightness(frames) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def shade(value: int) -> Image.Image:
    return Image.fromarray(np.full((32, 48, 3), value, dtype=np.uint8))


def test_even():
    assert even(4, 8) == [1, 3, 5, 7] and even(1, 9) == [4] and even(3, 3) == [0, 1, 2]
    assert even(4, 2) == [0, 0, 1, 1]


def test_a_folder_of_frames(tmp_path):
    for i in range(12):
        shade(10 * i).save(tmp_path / f"frame{i}.png")
    assert brightness(read_frames(tmp_path, 12)) == [10 * i for i in range(12)]
    assert brightness(read_frames(tmp_path, 3)) == [20, 60, 100]


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for i in range(20):
            clip.mux(stream.encode(av.VideoFrame.from_image(shade(10 * i))))
        clip.mux(stream.encode(None))
    frames = read_frames(tmp_path / "clip.mp4", 4)
    assert brightness(frames) == pytest.approx([20, 70, 120, 170], abs=6)
    assert all(frame.mode == "RGB" and frame.size == (48, 32) for frame in frames)


def test_what_is_no_video(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds no frames"):
        read_frames(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_frames(tmp_path / "nothing.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="frames=0"):
        read_frames(tmp_path, 0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        with pytest.raises(ImportError, match=r"llava-sparse\[video\]"):
            read_frames(tmp_path / "broken.mp4")
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="not a video that can be read"):
        read_frames(tmp_path / "broken.mp4")


def test_a_model_of_pictures_takes_no_video(dense, processor):
    with pytest.raises(ValueError, match="takes pictures alone"):
        ask(dense, processor, [shade(0)], "Is there a dog ?", "USER: <image> {question} ASSISTANT:", video=True)
