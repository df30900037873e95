"""A case of Qwen2.5-VL: its prompt, and the model that users load for it."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from oracle_files import metadata, near
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText


def load(weights: Path, blocks: list[int], **arguments: Any) -> Any:
    """The model of a stock checkpoint under the key names of the Hub."""
    config = json.loads((weights.parent / "config.json").read_text())
    config["vision_config"]["fullatt_block_indexes"] = blocks
    config["architectures"] = ["Qwen2_5_VLForConditionalGeneration"]
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(load_file(weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **arguments)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    model.generation_config.eos_token_id = None
    return model.eval()


class QwenCase:
    """A case, and a model for it.

    Attributes:
        entered: what entered the decoder, argument by argument.
    """

    def __init__(self, path: Path, attention: str) -> None:
        self.want, info = load_file(path), metadata(path)
        self.ids, self.pixels = self.want["input_ids"], (self.want["pixel_u8"].float() - 127.5) / 64
        self.model = load(
            near(path, info.get("weights", "weights")),
            json.loads(info["fullatt_block_indexes"]),
            attn_implementation=attention,
            sparse_method="visionzip",
            sparse_budgets=[float(info["dominant_ratio"]), float(info["contextual_ratio"])],
        )
        self.entered: dict[str, Any] = {}
        self.model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: self.entered.update(kwargs), with_kwargs=True
        )

    def inputs(self, rows: int = 1) -> dict[str, Any]:
        """The prompt; with two rows once more, behind three tokens more, so that the first row is padded."""
        ids = self.ids.expand(rows, -1)
        mask = torch.ones_like(ids)
        if rows > 1:
            padding, longer = torch.zeros(1, 3, dtype=ids.dtype), torch.tensor([[5, 6, 7]])
            ids = torch.cat([torch.cat([padding, longer]), ids], dim=1)
            mask = torch.cat([torch.tensor([[0, 0, 0], [1, 1, 1]]), mask], dim=1)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": (ids == self.model.config.image_token_id).long(),
            "pixel_values": torch.cat([self.pixels] * rows),
            "image_grid_thw": self.want["image_grid_thw"].expand(rows, -1),
        }
