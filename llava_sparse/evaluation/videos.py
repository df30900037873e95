"""Videos as pictures: evenly spaced frames of a file, or of a folder of frames."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from llava_sparse.pictures import read_picture

FRAMES = 8
HOW = "pip install 'llava-sparse[video]'"


def even(count: int, of: int) -> list[int]:
    """`count` evenly spaced numbers below `of`, each in the middle of its share; some repeat where there are fewer."""
    return [(2 * i + 1) * of // (2 * count) for i in range(count)]


def read_frames(path: str | Path, count: int = FRAMES) -> list[Image.Image]:
    """Evenly spaced frames of a video file, or of a folder that holds one picture a frame, in RGB.

    Args:
        path: a folder's pictures are taken in the order of their names, numbers in them as numbers.
        count: how many frames; where there are fewer, some are taken more than once.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ImportError: for a file, without PyAV.
        ValueError: if `count` is less than 1, the folder holds no picture, or the file is no video that can be read.
    """
    path = Path(path)
    if count < 1:
        raise ValueError(f"frames={count}: one or more are allowed.")
    if path.is_dir():
        files = sorted((file for file in path.iterdir() if file.is_file()), key=_natural)
        if not files:
            raise ValueError(f"{path}: this folder holds no frames; one picture a frame is allowed.")
        return [read_picture(files[i]) for i in even(count, len(files))]
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: a video file needs PyAV ({HOW}); a folder of frames needs nothing.") from error
    try:
        # Twice, for what a file says of its length need not be so; the second time frames are kept.
        with av.open(str(path)) as video:
            total = sum(1 for _ in video.decode(video=0))
        chosen, found = even(count, total), {}
        with av.open(str(path)) as video:
            for i, frame in enumerate(video.decode(video=0)):
                if i in chosen:
                    found[i] = read_picture(frame.to_image())
        return [found[i] for i in chosen]
    except Exception as error:  # Decoders raise whatever a damaged file leads them to.
        raise ValueError(f"{path}: this is not a video that can be read.") from error


def _natural(file: Path) -> list[tuple[int, str]]:
    """A name in parts, so that frame 10 comes behind frame 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]
