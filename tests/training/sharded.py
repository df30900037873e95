"""One of two processes that share a model: run by test_shards.py, under torchrun. Prints a line for each method."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

import llava_sparse


def tensor_parallel(case, folder: Path, batch) -> dict:
    """How far a model whose heads are shared out is from a whole one."""
    found = {}
    models = [
        AutoModelForImageTextToText.from_pretrained(folder, **case.config, **kwargs).eval()
        for kwargs in ({}, {"tp_plan": "auto"})
    ]
    with torch.no_grad():
        whole, split = (model(**batch, output_selection=True) for model in models)
    heads = models[1].model.language_model.layers[0].self_attn.q_proj
    found["split"] = str(type(heads.weight).__name__), list(getattr(heads.weight, "_local_tensor", heads.weight).shape)
    found["logits"] = float((whole.logits - split.logits).abs().max())
    found["kept"] = all(torch.equal(a.kept, b.kept) for a, b in zip(whole.selection, split.selection, strict=True))
    return found


def fsdp(case, folder: Path, batch) -> dict:
    """How far loss, gradients and answers of a model sharded by layer are from those of a whole one."""
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    whole, split = (llava_sparse.sparsify(tiny.dense_model(), case.method, **case.settings) for _ in range(2))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in [*split.model.language_model.layers, *split.model.vision_tower.encoder.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(split, mesh=mesh)
    losses = []
    for model in (whole, split):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
    name = "model.multi_modal_projector.linear_1.weight"
    own, other = (dict(model.named_parameters())[name].grad for model in (whole, split))
    answers = [model.eval().generate(**batch, max_new_tokens=3, do_sample=False) for model in (whole, split)]
    return {
        "loss": abs(losses[0] - losses[1]),
        "gradient": float((own - other.full_tensor()).abs().max()),
        "answers": torch.equal(*answers),
    }


def main() -> None:
    kind, folder, names = sys.argv[1], Path(sys.argv[2]), sys.argv[3].split(",")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batch = tiny.inputs(tiny.processor(), tiny.QUESTIONS)
    run = {"tensor_parallel": tensor_parallel, "fsdp": fsdp}[kind]
    for case in tiny.CASES:
        if case.name in names:
            try:
                found = run(case, folder, batch)
            except Exception as error:
                found = {"error": f"{type(error).__name__}: {error}"}
            if dist.get_rank() == 0 or "error" in found:
                print("FOUND", json.dumps({"case": case.name, **found}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
