"""Conversations about rendered training scenes of the reference model: what fine-tuning runs on offline."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
from reference.data import QUESTION_TOKENS, Scenes, render_scenes
from reference.evaluation import TEST_SEED
from reference.model import WORDS
from reference.scenes import Assets

from llava_sparse.reference import SCENES

SEED = 0  # of the scenes that the reference model was trained on


def write_conversations(folder: Path, count: int, questions: int, assets: Assets, seed: int = SEED) -> Path:
    """Renders `count` training scenes and writes `questions` about each, half with the answer yes, as LLaVA's JSON.

    Args:
        folder: gets `images/` and `conversations.json`; what an earlier call has begun is gone on with.
        seed: of the scenes and the questions.

    Returns:
        the JSON file.

    Raises:
        ValueError: for the seed of the evaluation's scenes, and if one of the shipped evaluation pictures came out.
    """
    if seed == TEST_SEED:
        raise ValueError(f"seed={seed} is that of the test scenes, which no model may be trained on; take another.")
    file = folder / "conversations.json"
    if file.is_file():
        return file
    (folder / "images").mkdir(parents=True, exist_ok=True)
    render_scenes(folder, seed, count, assets, os.cpu_count() or 1)
    scenes, rng = Scenes(folder), np.random.default_rng([seed, count])
    held_out = {hashlib.sha256(path.read_bytes()).digest() for path in (SCENES / "images").iterdir()}
    entries = []
    for number, patches in enumerate(scenes.patches):
        path = folder / "images" / f"scene_{number:06d}.jpg"
        Image.fromarray(scenes.pictures[number]).save(path, quality=92)
        if hashlib.sha256(path.read_bytes()).digest() in held_out:
            raise ValueError(f"{path} is an evaluation picture: take another seed.")
        ids, answers, _ = scenes.questions(rng, (patches > 0)[None].astype(np.float32), questions)
        for slot in range(questions):
            words = [WORDS[i] for i in ids[0, slot * QUESTION_TOKENS : (slot + 1) * QUESTION_TOKENS].tolist()]
            asked = " ".join(words[: words.index("?")]) + "?"
            said = {"from": "gpt", "value": "Yes" if answers[0, slot] else "No"}
            entries.append(
                {
                    "id": f"{number:06d}-{slot}",
                    "image": path.name,
                    "conversations": [{"from": "human", "value": f"<image>\n{asked}"}, said],
                }
            )
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(entries, indent=0), encoding="utf-8")
    os.replace(partial, file)
    return file
