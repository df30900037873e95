"""Scenes of everyday objects, rendered from emoji glyphs: what the reference model is trained and asked about.

A scene is a 336 x 336 picture with two to six categories of one theme on a photograph, a gradient or noise. Glyphs come
from Noto Color Emoji (SIL OFL 1.1) and Twemoji (CC BY 4.0), photographs from scikit-image and scikit-learn.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, PATCH = 336, 14
GRID = SIDE // PATCH
BACKGROUND, PARTLY = 0, 254  # labels of patches; category c is c + 1
SMALLEST, LARGEST = 28, 120  # longest side of an object in pixels, log-uniform

GLYPHS = {
    "dog": "🐕🐶", "cat": "🐈🐱", "bird": "🐦", "horse": "🐎🐴", "sheep": "🐑", "cow": "🐄🐮", "elephant": "🐘",
    "bear": "🐻", "zebra": "🦓", "giraffe": "🦒", "car": "🚗🚙", "bus": "🚌", "bicycle": "🚲", "airplane": "✈",
    "boat": "⛵🚤", "train": "🚂", "truck": "🚚", "motorcycle": "🏍", "banana": "🍌", "apple": "🍎", "orange": "🍊",
    "broccoli": "🥦", "carrot": "🥕", "pizza": "🍕", "donut": "🍩", "cake": "🎂🍰", "sandwich": "🥪", "cup": "☕",
    "knife": "🔪", "spoon": "🥄", "bottle": "🍾", "bowl": "🥣", "chair": "🪑", "couch": "🛋", "bed": "🛏",
    "toilet": "🚽", "tv": "📺", "laptop": "💻", "keyboard": "⌨", "mouse": "🖱", "clock": "⏰", "book": "📕📖",
    "scissors": "✂", "toothbrush": "🪥", "umbrella": "☂", "backpack": "🎒", "tie": "👔", "kite": "🪁",
}  # fmt: skip
CATEGORIES = list(GLYPHS)
# How often a theme is drawn, and its categories, the popular ones first.
THEMES = {
    "farm": (1.0, "cow horse sheep dog cat bird truck bicycle apple carrot"),
    "street": (1.5, "car bus bicycle truck motorcycle dog umbrella train clock bird backpack"),
    "kitchen": (2.2, "banana apple orange broccoli carrot pizza donut cake sandwich cup knife spoon bottle bowl chair"
                     " clock"),
    "office": (1.5, "laptop keyboard mouse book chair clock cup scissors tv backpack tie bottle"),
    "bathroom": (1.0, "toilet toothbrush scissors bottle cup clock cat"),
    "living": (1.5, "couch tv chair book clock cat dog cup laptop bed"),
    "safari": (0.8, "elephant zebra giraffe bear bird truck"),
    "coast": (1.0, "airplane boat kite bird umbrella dog bicycle bottle"),
}  # fmt: skip
PHOTOGRAPHS = ("astronaut", "rocket", "hubble_deep_field", "retina", "grass", "gravel", "brick", "immunohistochemistry",
               "coins", "moon", "camera")  # fmt: skip
NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
TWEMOJI = Path("node_modules/emoji-datasource-twitter/img/twitter/64")


@dataclass(frozen=True)
class Assets:
    """Where glyphs come from.

    Attributes:
        noto: the font file of Noto Color Emoji (Debian: `apt install fonts-noto-color-emoji`).
        twemoji: the folder of 64-pixel pictures of Twemoji (`npm install emoji-datasource-twitter`).
    """

    noto: Path = NOTO
    twemoji: Path = TWEMOJI

    def check(self) -> None:
        """Raises FileNotFoundError, saying how to get what is missing."""
        if not self.noto.is_file():
            raise FileNotFoundError(f"{self.noto}: no such font; apt install fonts-noto-color-emoji, or pass --noto.")
        if not self.twemoji.is_dir():
            raise FileNotFoundError(
                f"{self.twemoji}: no such folder; npm install emoji-datasource-twitter, or pass --twemoji."
            )


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it.

    Attributes:
        picture: `(336, 336, 3)` uint8.
        labels: `(24, 24)` uint8, the category of a patch plus 1, `BACKGROUND` or `PARTLY` covered.
        objects: name and box `[x0, y0, x1, y1]` in pixels of the visible pixels of each object.
    """

    picture: np.ndarray
    labels: np.ndarray
    objects: list[dict]

    @property
    def present(self) -> np.ndarray:
        """`(categories,)` bool."""
        return np.isin(CATEGORIES, [item["name"] for item in self.objects])


@cache
def _sprites(assets: Assets) -> dict[str, list[Image.Image]]:
    font = ImageFont.truetype(str(assets.noto), 109)
    sprites: dict[str, list[Image.Image]] = {}
    for category, glyphs in GLYPHS.items():
        found = []
        for glyph in glyphs:
            canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
            ImageDraw.Draw(canvas).text((10, 10), glyph, font=font, embedded_color=True)
            names = [f"{ord(glyph):04x}{suffix}.png" for suffix in ("", "-fe0f")]
            files = [assets.twemoji / name for name in names if (assets.twemoji / name).is_file()]
            pictures = [canvas] + ([Image.open(files[0]).convert("RGBA")] if files else [])
            found += [image.crop(box) for image in pictures if (box := image.getchannel("A").getbbox())]
        if not found:
            raise ValueError(f"{assets}: there is no glyph for {category}.")
        sprites[category] = found
    return sprites


@cache
def _photographs() -> list[Image.Image]:
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [getattr(data, name)() for name in PHOTOGRAPHS]
    rgb = [np.stack([a] * 3, -1) if a.ndim == 2 else a[..., :3] for a in arrays]
    return [Image.fromarray(a) for a in rgb] + [Image.fromarray(a) for a in load_sample_images().images] * 2


def _background(rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.5:
        photos = _photographs()
        photo = photos[rng.integers(len(photos))]
        side = int(rng.uniform(0.35, 1.0) * min(photo.size))
        x, y = rng.integers(0, photo.size[0] - side + 1), rng.integers(0, photo.size[1] - side + 1)
        crop = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
        pixels = np.asarray(crop).astype(np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        pixels = pixels * rng.uniform(0.6, 1.2) * rng.uniform(0.75, 1.25, 3)
    elif kind < 0.8:
        corners = rng.uniform(0, 255, (4, 3))
        u, v = np.linspace(0, 1, SIDE)[None, :, None], np.linspace(0, 1, SIDE)[:, None, None]
        pixels = (corners[0] * (1 - u) + corners[1] * u) * (1 - v) + (corners[2] * (1 - u) + corners[3] * u) * v
    else:
        n = int(rng.choice([4, 8, 16, 32]))
        noise = Image.fromarray(rng.integers(0, 255, (n, n, 3), dtype=np.uint8))
        pixels = np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(np.float32) * 0.7 + 30
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    _distract(rng, ImageDraw.Draw(image))
    return image


def _distract(rng: np.random.Generator, draw: ImageDraw.ImageDraw) -> None:
    """Up to six plain shapes, so that not everything that stands out is an object."""
    for _ in range(rng.integers(0, 7)):
        x, y = rng.uniform(0, SIDE, 2)
        w, h = rng.uniform(10, 110, 2)
        colour = tuple(int(c) for c in rng.integers(0, 255, 3))
        shape = rng.integers(3)
        if shape == 0:
            draw.rectangle((x, y, x + w, y + h), fill=colour)
        elif shape == 1:
            draw.ellipse((x, y, x + w, y + h), fill=colour)
        else:
            draw.line((x, y, x + w * 2 - 100, y + h * 2 - 100), fill=colour, width=int(rng.integers(2, 8)))


def _draw_categories(rng: np.random.Generator) -> list[str]:
    """Two to six categories of one theme, popular ones more often, sometimes one from elsewhere or one twice."""
    count = int(rng.choice([2, 3, 4, 5, 6], p=[0.1, 0.25, 0.3, 0.2, 0.15]))
    weights = np.array([weight for weight, _ in THEMES.values()])
    theme = list(THEMES.values())[rng.choice(len(THEMES), p=weights / weights.sum())][1].split()
    chosen: list[str] = []
    while len(chosen) < count:
        name = str(rng.choice(theme)) if rng.random() < 0.88 else CATEGORIES[rng.integers(len(CATEGORIES))]
        popularity = theme.index(name) if name in theme else 3
        if rng.random() <= 1 / (1 + 0.12 * popularity) and name not in chosen:
            chosen.append(name)
    return chosen + chosen[:1] if rng.random() < 0.15 else chosen


def _place(rng: np.random.Generator, name: str, image: Image.Image, owner: np.ndarray, areas: list[int],
           assets: Assets) -> bool:  # fmt: skip
    """Pastes an object where every earlier one keeps at least 65 % of its pixels; False if 12 tries find no place."""
    for _ in range(12):
        size = float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST))))
        sprites = _sprites(assets)[name]
        sprite = sprites[rng.integers(len(sprites))]
        scale = size / max(sprite.size)
        shape = (max(6, int(sprite.size[0] * scale)), max(6, int(sprite.size[1] * scale)))
        item = sprite.resize(shape, Image.Resampling.BICUBIC if scale > 0.9 else Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            item = item.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        item = item.rotate(float(rng.normal(0, 14)), expand=True, resample=Image.Resampling.BICUBIC)
        w, h = item.size
        if w >= SIDE or h >= SIDE:
            continue
        x, y = int(rng.integers(0, SIDE - w)), int(rng.integers(0, SIDE - h))
        opaque = np.asarray(item.getchannel("A")) > 100
        region = owner[y : y + h, x : x + w]
        covered = {int(j): int(((region == j) & opaque).sum()) for j in np.unique(region) if j >= 0}
        if any((owner == j).sum() - lost < 0.65 * areas[j] for j, lost in covered.items()):
            continue
        brightness = rng.uniform(0.75, 1.2)
        image.paste(
            item.convert("RGB").point(lambda v, by=brightness: min(255, int(v * by))), (x, y), item.getchannel("A")
        )
        region[opaque] = len(areas)
        areas.append(int(opaque.sum()))
        return True
    return False


def render(rng: np.random.Generator, assets: Assets = Assets()) -> Scene:
    """Draws one scene."""
    image = _background(rng)
    owner = np.full((SIDE, SIDE), -1, np.int16)
    areas: list[int] = []
    names = [name for name in _draw_categories(rng) if _place(rng, name, image, owner, areas, assets)]
    pixels = np.asarray(image)
    if rng.random() < 0.5:
        noisy = pixels.astype(np.float32) + rng.normal(0, rng.uniform(2, 12), (SIDE, SIDE, 1))
        pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    objects = []
    for j, name in enumerate(names):
        rows, columns = np.nonzero(owner == j)
        box = [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]
        objects.append({"name": name, "box": box})
    return Scene(pixels, _patch_labels(owner, names), objects)


def _patch_labels(owner: np.ndarray, names: list[str]) -> np.ndarray:
    """What each patch shows: an object that covers a quarter of it, or has no patch that it covers more."""
    if not names:
        return np.full((GRID, GRID), BACKGROUND, np.uint8)
    cover = np.stack([(owner == j).reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)) for j in range(len(names))])
    category = np.array([CATEGORIES.index(name) + 1 for name in names], np.uint8)
    labels = np.full((GRID, GRID), PARTLY, np.uint8)
    labels[cover.sum(0) < 0.06] = BACKGROUND
    clear = cover.max(0) >= 0.25
    labels[clear] = category[cover.argmax(0)[clear]]
    for j, c in enumerate(category):
        labels[np.unravel_index(cover[j].argmax(), (GRID, GRID))] = c
    return labels


def scenes(seed: int, count: int, assets: Assets, processes: int) -> Iterator[Scene]:
    """`count` scenes, the same for a seed whatever the number of processes."""
    assets.check()
    jobs = ((seed, number, assets) for number in range(count))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_render_numbered, jobs, chunksize=16)


def _render_numbered(job: tuple[int, int, Assets]) -> Scene:
    seed, number, assets = job
    return render(np.random.default_rng([seed, number]), assets)


def write_question_folder(folder: Path, seed: int, count: int, assets: Assets, processes: int) -> None:
    """Pictures (JPEG) and objects.jsonl of `count` scenes, for `llava-sparse pope-build`."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, scene in enumerate(scenes(seed, count, assets, processes)):
        name = f"scene_{number:06d}.jpg"
        Image.fromarray(scene.picture).save(folder / "images" / name, quality=92)
        lines.append(json.dumps({"image": name, "objects": scene.objects}))
    (folder / "objects.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
