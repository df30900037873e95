"""A case of Video-LLaVA: its prompt, the model that users load for it, and what the authors' code computes."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from oracle_files import assert_close, metadata, near
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, VideoLlavaConfig

from llava_sparse.modeling.method_sparsevlm import SparseVLM, attention_rank
from llava_sparse.modeling.modeling_sparse_video_llava import PIXELS

PUBLISHED = {
    "sparse_method": "sparsevlm",
    "sparse_layers": [1],
    "sparse_options": {"version": "1.0", "scale": 1.0, "bias": 0.0},
}
LAYER = 1


@dataclass(frozen=True)
class RecordedSparseVLM(SparseVLM):
    """Takes a recorded draw of the density noise, and notes what it sees and merges."""

    noise: Any = None
    seen: Any = None

    def density_noise(self, layer, x):
        self.seen.update(merge_input=x)
        return self.noise.to(x).expand(x.shape[0], -1)

    def rate(self, visual, text, text_valid):
        raters = super().rate(visual, text, text_valid)
        self.seen.update(visual=visual, raters=raters)
        return raters

    def scores(self, attention):
        self.seen.update(attention=attention, rank=attention_rank(attention))
        return super().scores(attention)


@lru_cache(maxsize=2)
def stock_folder(weights: Path) -> TemporaryDirectory:
    """A stock checkpoint under the key names of the Hub."""
    folder = TemporaryDirectory()
    sizes = json.loads((weights.parent / "config.json").read_text())
    tower = {k: v for k, v in sizes["vision_config"].items() if k not in ("add_time_attn", "num_frames")}
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**sizes["text_config"]),
        image_token_index=sizes["image_token_id"],
        video_token_index=sizes["video_token_id"],
    )
    config.save_pretrained(folder.name)
    save_file(load_file(weights), Path(folder.name) / "model.safetensors", metadata={"format": "pt"})
    return folder


class VideoCase:
    """A case, and a model for it."""

    def __init__(self, path: Path, attention: str, **sparse: Any) -> None:
        self.want, self.info = load_file(path), metadata(path)
        self.kind, self.ids = self.info["kind"], self.want["input_ids"]
        self.pre, self.visual = int(self.info["pre"]), int(self.info["V"])
        self.pixels = (self.want["pixel_u8"].float() - 127.5) / 64
        model, report = AutoModelForImageTextToText.from_pretrained(
            stock_folder(near(path, "weights")).name,
            attn_implementation=attention,
            output_loading_info=True,
            **sparse,
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        self.model, self.seen, self.entered = model.eval(), {}, []
        if sparse:
            plain = {f.name: getattr(model.model.sparsifier, f.name) for f in fields(SparseVLM)}
            model.model.sparsifier = RecordedSparseVLM(**plain, noise=self.want.get("noise"), seen=self.seen)
        for module in (*model.model.language_model.layers, model.model.language_model.norm):
            module.register_forward_pre_hook(lambda module, args: self.entered.append(args[0]))

    def inputs(self, rows: int = 1) -> dict[str, Any]:
        """The prompt; with two rows once more, behind three tokens more, so that the first row is padded."""
        ids = self.ids.expand(rows, -1)
        mask = torch.ones_like(ids)
        if rows > 1:
            padding, longer = torch.zeros(1, 3, dtype=ids.dtype), torch.tensor([[5, 6, 7]])
            ids = torch.cat([torch.cat([padding, longer]), ids], dim=1)
            mask = torch.cat([torch.tensor([[0, 0, 0], [1, 1, 1]]), mask], dim=1)
        name = "pixel_values_videos" if self.kind == "video" else PIXELS
        pixels = torch.cat([self.pixels] * rows)
        return {"input_ids": ids, "attention_mask": mask, name: pixels}

    def check_selection(self, selection: Any) -> None:
        """Raters, attention, scores, rank, and what is kept, recycled and merged."""
        want, seen, count = self.want, self.seen, self.visual
        assert torch.equal(seen["raters"][0].nonzero().flatten(), want["raters"])
        assert_close(seen["visual"][0], want["visual_features"], "visual_features")
        attention = seen["attention"].probabilities[0].mean(0)[seen["raters"][0]]
        assert_close(attention, want["rater_attention"], "rater_attention")
        assert seen["rank"][0] == int(self.info["rank"])
        (stage,) = selection
        assert stage.layer == LAYER
        assert_close(stage.scores[0], want["scores"], "scores")
        assert torch.equal(stage.kept[0], want["kept"])
        assert torch.equal(stage.raters[0][stage.raters[0] >= 0], want["raters"] + self.pre + count)
        if "merged" not in want:
            return
        assert_close(seen["merge_input"][0], want["merge_input"], "merge_input")
        merged = self.entered[LAYER + 1][0, self.pre + len(want["kept"]) :][: len(want["merged"])]
        assert_close(merged, want["merged"], "merged")
        assert torch.equal((stage.merge_map[0] >= 0).nonzero().flatten(), want["recycled"].sort().values)

    def check_prefill(self, outputs: Any) -> None:
        """Lengths, positions, and what layers hand on."""
        want = self.want
        assert [x.shape[1] for x in self.entered[:-1]] == want["layer_in_len"].tolist()
        assert lengths(outputs) == want["kv_len_prefill"].tolist()
        assert_close(self.entered[0][0], want["inputs_embeds"], "inputs_embeds")
        assert_close(self.entered[LAYER + 1][0], want["hidden_after_pruning"], "hidden_after_pruning")
        assert_close(outputs.hidden_states[-1][0], want["final_hidden"], "final_hidden")
        assert_close(outputs.logits[0], want["logits"], "logits")


def lengths(outputs: Any) -> list[int]:
    """Tokens that each layer of the cache holds."""
    return [layer.keys.shape[-2] for layer in outputs.past_key_values.layers]
