"""Files of `tests/oracles`, how near to them results have to be, and the models that they were made with."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, LlamaConfig

from llava_sparse import SparseCLIPVisionConfig, SparseCLIPVisionModel, SparseLlavaConfig
from llava_sparse import SparseLlavaForConditionalGeneration as SparseLlava

OWN = Path(__file__).parent / "oracles"
ROOT = Path(os.environ.get("LLAVA_SPARSE_ORACLES") or OWN)
FLOAT_TOLERANCE = 1e-4  # of the largest magnitude of the tensor
PATCH = 14
LARGEST: dict[str, float] = {}


def cases(folder: str, pattern: str) -> list:
    found = sorted(ROOT.rglob(pattern))
    return [pytest.param(path, id=path.stem) for path in found if path.parent.name == folder]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def near(path: Path, name: str) -> Path:
    """A file that a case names, with or without its ending; cases may lie apart from what they share."""
    stem = name.removesuffix(".safetensors")
    for folder in (path.parent, OWN / path.parent.name):
        if (folder / f"{stem}.safetensors").exists():
            return folder / f"{stem}.safetensors"
    raise FileNotFoundError(f"{path.name} names {name}, which is not beside it")


def settings(want: dict, ending: str) -> list[str]:
    """The prefixes "k64.", "r0.5.", ... of a file that holds one input and what becomes of it."""
    return sorted(key.removesuffix(ending) for key in want if key.endswith(f".{ending}"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    largest = expected.abs().max().clamp(min=1e-12)
    error = ((actual.double() - expected.double()).abs().max() / largest).item()
    kind = what.split(".")[-1].split(" after")[0].split(",")[0]
    LARGEST[kind] = max(LARGEST.get(kind, 0.0), error)
    assert error <= FLOAT_TOLERANCE, f"{what}: off by {error:.2e} of the largest magnitude"


# --- Methods in the decoder --------------------------------------------------------------------------------------


@dataclass
class Case:
    """A prompt of embeddings, and what a decoder that prunes it computes."""

    path: Path
    want: dict
    info: dict
    given: dict
    pre: int
    visual: int
    text: int

    @classmethod
    def read(cls, path: Path) -> Case:
        info = metadata(path)
        return cls(
            path=path,
            want=load_file(path),
            info=info,
            given=load_file(near(path, info["input"])),
            pre=int(info["pre_prompt_length"]),
            visual=int(info["image_tokens"]),
            text=int(info["text_tokens"]),
        )

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(1, self.pre + self.visual + self.text, dtype=torch.bool)
        mask[:, self.pre : self.pre + self.visual] = True
        return mask

    def text_config(self) -> LlamaConfig:
        text = json.loads((near(self.path, self.info["weights"]).parent / "llama_config.json").read_text())
        text["rope_theta"] = float(self.info["rope_theta"])
        text.pop("model_type")
        return LlamaConfig(**text)

    def model(self, attention: str, **sparse: Any) -> SparseLlava:
        """The decoder of the case as part of a LLaVA whose images have at least as many patches as the prompt."""
        side = max(24, math.ceil(self.visual**0.5))
        config = SparseLlavaConfig(
            text_config=self.text_config(), vision_config=tiny_vision(16, side), image_token_index=127, **sparse
        )
        model = SparseLlava._from_config(config, attn_implementation=attention)
        loaded = load_file(near(self.path, self.info["weights"]))
        model.model.language_model.load_state_dict(
            {k.removeprefix("model."): v for k, v in loaded.items() if k.startswith("model.")}
        )
        model.lm_head.load_state_dict({"weight": loaded["lm_head.weight"]})
        return model.eval()


def tiny_vision(width: int, side: int) -> CLIPVisionConfig:
    """A tower for images of side x side patches."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=PATCH * side,
        patch_size=PATCH,
    )


@dataclass
class Run:
    """A model with a prompt in its cache, `batch` times the same; the last row is compared.

    Attributes:
        entered: what entered each decoder layer and the final norm in the last forward pass.
    """

    case: Case
    model: SparseLlava
    batch: int
    entered: list[torch.Tensor]
    out: Any = None

    @classmethod
    def prefill(cls, case: Case, model: SparseLlava, batch: int) -> Run:
        entered: list[torch.Tensor] = []
        decoder = model.model.language_model
        for module in (*decoder.layers, decoder.norm):
            module.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        run = cls(case, model, batch, entered)
        mask = case.mask().expand(batch, -1)
        run.forward(case.given["inputs_embeds"], visual_mask=mask, output_selection=True, as_passed=False)
        return run

    def forward(self, embeds: torch.Tensor, **kwargs: Any) -> None:
        self.entered.clear()
        self.out = self.model(
            inputs_embeds=embeds.expand(self.batch, -1, -1), output_hidden_states=True, use_cache=True, **kwargs
        )

    @property
    def row(self) -> int:
        return self.batch - 1

    @property
    def final(self) -> torch.Tensor:
        return self.out.hidden_states[-1][self.row]

    def cache_lengths(self) -> list[int]:
        return [layer.keys.shape[-2] for layer in self.out.past_key_values.layers]

    def check_prefill(self) -> None:
        """Compares lengths, what every layer hands on, and what comes out."""
        want = self.case.want
        assert [x.shape[1] for x in self.entered[:-1]] == want["layer_in_len"].tolist()
        assert self.cache_lengths() == want["kv_len_prefill"].tolist()
        for layer, handed in enumerate(self.entered[1:]):
            last, mean = handed[self.row, -1], handed[self.row].mean(0)
            assert_close(last, want["last_token_hidden"][layer], f"last token after layer {layer}")
            assert_close(mean, want["mean_hidden"][layer], f"mean after layer {layer}")
        assert_close(self.final, want["final_hidden"], "final_hidden")
        assert_close(self.out.logits[self.row, -1], want["logits_last"], "logits_last")

    def check_decoding(self) -> None:
        """Feeds the new tokens one by one."""
        want, cache = self.case.want, self.out.past_key_values
        for step, token in enumerate(self.case.given["decode_embeds"]):
            self.forward(token[None, None], past_key_values=cache)
            assert_close(self.final[0], want["decode_hidden"][step], f"decode_hidden, step {step}")
            for layer, handed in enumerate(self.entered[1:]):
                expected = want["decode_layer_hidden"][step, layer]
                assert_close(handed[self.row, 0], expected, f"decode_layer_hidden, step {step}, layer {layer}")
            if "decode_logits" in want:
                assert_close(self.out.logits[self.row, 0], want["decode_logits"][step], f"decode_logits, step {step}")
            assert self.cache_lengths() == want["kv_len_decode"][step].tolist()


# --- Towers ------------------------------------------------------------------------------------------------------


def timm_tower(weights: Path, **sparse: Any) -> SparseCLIPVisionModel:
    """A timm vision transformer's blocks in a CLIP tower that has a layer more: LLaVA leaves the last one out."""
    info, loaded = metadata(weights), load_file(weights)
    width, depth = int(info["embed_dim"]), int(info["depth"])
    config = SparseCLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * float(info["mlp_ratio"])),
        num_hidden_layers=depth + 1,
        num_attention_heads=int(info["num_heads"]),
        image_size=int(info["img_size"]),
        patch_size=int(info["patch_size"]),
        layer_norm_eps=float(info["layer_norm_eps"]),
        hidden_act="gelu",
        **sparse,
    )
    model = SparseCLIPVisionModel._from_config(config)
    # CLIP's patches have no bias of their own.
    positions = loaded["pos_embed"][0].clone()
    positions[1:] += loaded["patch_embed.proj.bias"]
    state = {
        "embeddings.class_embedding": loaded["cls_token"].flatten(),
        "embeddings.patch_embedding.weight": loaded["patch_embed.proj.weight"],
        "embeddings.position_embedding.weight": positions,
    }
    same = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj"}
    same |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for block in range(depth):
        for kind in ("weight", "bias"):
            ours, theirs = f"encoder.layers.{block}", f"blocks.{block}"
            state |= {f"{ours}.{new}.{kind}": loaded[f"{theirs}.{old}.{kind}"] for old, new in same.items()}
            for name, part in zip("qkv", loaded[f"{theirs}.attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{ours}.self_attn.{name}_proj.{kind}"] = part
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    model.pre_layrnorm = torch.nn.Identity()
    return model.eval()


def clip_model(weights: Path) -> CLIPModel:
    """The two towers of a CLIP whose sizes are in the metadata."""
    info = metadata(weights)
    sizes = {part: {**size, "hidden_act": info["hidden_act"]} for part, size in json.loads(info["config"]).items()}
    config = CLIPConfig(
        text_config=sizes["text"], vision_config=sizes["vision"], projection_dim=sizes["text"]["projection_dim"]
    )
    model = CLIPModel._from_config(config)
    model.load_state_dict(load_file(weights))
    return model.eval()
