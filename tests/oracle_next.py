"""Cases of `tests/oracles/llava_next`: pictures in tiles, prompts around them, and the model that they are for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from oracle_files import metadata, near
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import llava_sparse  # noqa: F401  (registers)

STEPS = 5


@lru_cache(maxsize=1)
def _loaded(weights: Path, pinpoints: str, double: bool) -> Any:
    """The model, loaded as users load it, from the names that checkpoints on the Hub have."""
    config = json.loads((weights.parent / "config.json").read_text())
    config |= {"model_type": "llava_next", "architectures": ["LlavaNextForConditionalGeneration"]}
    config["image_token_index"] = config["text_config"]["vocab_size"] - 1
    config["text_config"]["model_type"], config["vision_config"]["model_type"] = "llama", "clip_vision_model"
    config["image_grid_pinpoints"] = json.loads(pinpoints) or config["image_grid_pinpoints"]
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file(load_file(weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model, told = AutoModelForImageTextToText.from_pretrained(
            folder, sparse_method="visionzip", sparse_budget=160, output_loading_info=True
        )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    if double:
        model.model.vision_tower.double()
        model.model.multi_modal_projector.double()
    return model.eval()


@dataclass
class NextCase:
    """What a model makes of some pictures, each in a prompt of its own."""

    want: dict
    info: dict
    given: dict
    model: Any

    @classmethod
    def read(cls, path: Path) -> NextCase:
        info, want = metadata(path), load_file(path)
        # The published VisPruner knows grids of 2 x 2 tiles alone, and reads duplicates off rounding in float32.
        pruner = info["method"] == "vispruner"
        model = _loaded(near(path, "weights"), "[[48, 48]]" if pruner else "null", pruner)
        case = cls(want, info, load_file(near(path, info["input"])), model)
        model.set_sparsity(**case.sparsity())
        return case

    def sparsity(self) -> dict[str, Any]:
        """The case as arguments of `set_sparsity`."""
        info, method = self.info, self.info["method"]
        settings: dict[str, dict[str, Any]] = {
            "dense": {},
            "visionzip": {"budgets": [int(info.get("dominant", 0)), int(info.get("contextual", 0))]},
            "scope": {"budget": int(info.get("token_num", 0))},
            "divprune": {"budget": float(info.get("ratio", 0))},
            "vispruner": {
                "budgets": [int(info.get("visual_token_num", 0))],
                "options": {"important": float(info.get("important_ratio", 0))},
            },
        }
        return {"method": None if method == "dense" else method, **settings[method]}

    @property
    def pictures(self) -> range:
        return range(len(self.given["image_sizes"]))

    @property
    def kept(self) -> list[int]:
        """Tokens of each picture."""
        return json.loads(self.info["tokens"])

    @property
    def dense(self) -> list[int]:
        """Tokens of each picture that stock processors write."""
        model, sizes = self.model.model, self.given["image_sizes"]
        return [model.dense_tokens(size, grid) for size, grid in zip(sizes, model.tile_grids(sizes), strict=True)]

    @property
    def before(self) -> list[int]:
        """Tokens before each picture."""
        return json.loads(self.info["pre"])

    def known(self, picture: int) -> bool:
        """Whether the tokens before a picture are recorded; DivPrune's code has 35, whatever the input holds."""
        return len(self.given[f"i{picture}.pre_ids"]) == self.before[picture]

    def prompts(self, pictures: Any, written: list[int]) -> dict[str, torch.Tensor]:
        """A batch, padded on the left, as a processor gives it."""
        tiles = [(self.given[f"i{i}.pixel_u8"].double() - 127.5) / 64 for i in pictures]
        most = max(len(x) for x in tiles)
        pixels = torch.stack([torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in tiles])
        before = self.before
        rows = []
        for i in pictures:
            pre, post = self.given[f"i{i}.pre_ids"], self.given[f"i{i}.post_ids"]
            pre = pre.repeat(1 + before[i] // len(pre))[: before[i]]
            rows.append(torch.cat([pre, pre.new_full((written[i],), self.model.config.image_token_id), post]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(x) for x in rows], True, padding_side="left")
        dtype = self.model.model.multi_modal_projector.linear_1.weight.dtype
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "pixel_values": pixels.to(dtype),
            "image_sizes": self.given["image_sizes"][list(pictures)],
        }

    def generate(self, batch: dict[str, torch.Tensor]) -> Any:
        return self.model.generate(
            **batch, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )

    def numbers(self, picture: int) -> torch.Tensor | None:
        """What is kept of a picture, as `Selection` numbers it."""
        own = {name.partition(".")[2]: value for name, value in self.want.items() if name.startswith(f"i{picture}.")}
        if "selected" in own:  # Of the packed picture.
            return own["selected"].sort().values
        if "kept_mask" in own:
            return own["kept_mask"].flatten().nonzero().flatten()
        tokens = own.get("dominant", own.get("keep"))
        if tokens is None:
            return None
        patches = (self.model.config.vision_config.image_size // self.model.config.vision_config.patch_size) ** 2
        tile = torch.arange(len(tokens))[:, None]
        return torch.where(tokens > 0, tokens - 1 + tile * patches, -1).flatten().sort().values[(tokens == 0).sum() :]
