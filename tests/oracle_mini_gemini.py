"""A case of Mini-Gemini: its prompt, the model that users load for it, and what the authors' code computes."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from oracle_files import assert_close, metadata, near
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig

from llava_sparse.modeling.configuration_sparse_mini_gemini import SparseMiniGeminiConfig


class GeminiCase:
    """A case, and the dense model for it, from a checkpoint under published key names."""

    def __init__(self, path: Path, attention: str = "sdpa") -> None:
        self.want, self.info, weights = load_file(path), metadata(path), near(path, "weights")
        sizes = json.loads((weights.parent / "config.json").read_text())
        grid, whole = int(self.info["image_grid"]), self.info["image_global"] == "True"
        self.image = sizes["text_config"]["vocab_size"]  # A token that the vocabulary does not have.
        config = SparseMiniGeminiConfig(
            vision_config=CLIPVisionConfig(**sizes["vision_config"]),
            text_config=LlamaConfig(**sizes["text_config"]),
            aux_hidden_sizes=sizes["convnext"]["dims"],
            aux_depths=sizes["convnext"]["depths"],
            image_size_aux=sizes["image_size_aux"] * grid,
            image_grid=grid,
            image_global=whole,
            image_token_index=self.image,
        )
        with TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            save_file(load_file(weights), Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.model, report = AutoModelForImageTextToText.from_pretrained(
                folder, attn_implementation=attention, output_loading_info=True
            )
        assert not report["missing_keys"] and not report["unexpected_keys"]

    def inputs(self) -> dict[str, Any]:
        want = self.want
        images = torch.full((len(want["pre_ids"]), want["features"].shape[1]), self.image)
        ids = torch.cat([want["pre_ids"], images, want["post_ids"]], dim=1)
        pixels = {"pixel_values": want["pixel_u8"], "pixel_values_aux": want["aux_u8"]}
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            **{name: (x.float() - 127.5) / 64 for name, x in pixels.items()},
        }

    def check(self) -> None:
        """Compares the towers, what tokens ask and find, and what enters and leaves the decoder."""
        want, model, mined, entered = self.want, self.model.model, [], {}
        mine = model.mine

        def recorded(tokens: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
            mined.append((tokens, mine(tokens, high)))
            return mined[-1][1]

        model.mine = recorded
        model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: entered.update(kwargs), with_kwargs=True
        )
        inputs = self.inputs()
        assert_close(model.aux_tower(inputs["pixel_values_aux"]), want["aux_features"], "aux_features")
        logits = self.model(**inputs).logits
        images = len(want["features"])
        query, found = (torch.stack(x.split(len(x) // images)) for x in mined[0])
        parts = sorted(name for name in want if name.endswith(".query"))
        whole = self.info["image_global"] == "True" and int(self.info["image_grid"]) > 1
        for i, name in enumerate(parts):
            # The whole picture first, then the tiles.
            tiles = slice(None) if not whole else slice(0, 1) if i == 0 else slice(1, None)
            assert_close(query[:, tiles].flatten(0, 1), want[name], "query")
            assert_close(found[:, tiles].flatten(0, 1), want[name.replace("query", "mined")], "mined")
        embeds = entered["inputs_embeds"]
        assert_close(embeds, want["inputs_embeds"], "inputs_embeds")
        pre = want["pre_ids"].shape[1]
        assert_close(embeds[:, pre : pre + want["features"].shape[1]], want["features"], "features")
        assert_close(logits[:, -1], want["logits_last"], "logits_last")
