"""Trains the embedded reference model from nothing: renders its scenes, trains in stages, writes a checkpoint.

    pip install scikit-image scikit-learn; npm install emoji-datasource-twitter; apt install fonts-noto-color-emoji
    export OMP_NUM_THREADS=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000
    torchrun --nproc_per_node 2 examples/train_reference.py --folder runs/reference

The settings are for CPUs: single-thread processes instead of threads, and an allocator that keeps the large blocks that
it would else give back after every step. Run the same command again to go on where a run stopped.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from reference.data import render_scenes
from reference.evaluation import evaluate
from reference.model import FIRST_LAYER, build_model, build_processor
from reference.scenes import GRID, NOTO, TWEMOJI, Assets
from reference.training import Run, Stage, average_stages, decoder_stage, projector_stage, vision_stage

STAGES = {
    "vision": (vision_stage, Stage("vision", 1000, 128, 12, 2e-3)),
    "projector": (projector_stage, Stage("projector", 200, 32, 12, 3e-3)),
    "decoder": (
        decoder_stage,
        Stage("decoder", 600, 64, 8, 2e-3, first_layer=FIRST_LAYER, caption_weight=0.3, decoys=False),
    ),
    "windows": (decoder_stage, Stage("windows", 450, 32, 16, 1.5e-3, vision_rate=5e-4)),
    "pictures": (
        decoder_stage,
        Stage("pictures", 300, 32, GRID, 1e-3, vision_rate=5e-4, attention="sdpa", word_weight=0.3),
    ),
    "polish": (
        decoder_stage,
        Stage("polish", 320, 32, GRID, 8e-4, vision_rate=8e-4, attention="sdpa", word_weight=0.3),
    ),
    "sharpen": (vision_stage, Stage("sharpen", 240, 32, GRID, 8e-4, attention="sdpa", balanced=True)),
    "finish": (
        decoder_stage,
        Stage("finish", 60, 32, GRID, 5e-4, vision_rate=3e-4, attention="sdpa", word_weight=0.3, balanced=True),
    ),
}
LAST = "finish"
AVERAGED = ("polish", "finish")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where scenes, states and the checkpoint go")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--test-scenes", type=int, default=1000, help="to evaluate on at the end; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies the steps of every stage")
    parser.add_argument("--until", choices=STAGES, default=LAST, help="the last stage to run")
    parser.add_argument("--noto", type=Path, default=NOTO)
    parser.add_argument("--twemoji", type=Path, default=TWEMOJI)
    given = parser.parse_args()

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    given.folder.mkdir(parents=True, exist_ok=True)
    assets = Assets(given.noto, given.twemoji)
    if rank == 0:
        render_scenes(given.folder, given.seed, given.scenes, assets, os.cpu_count() or 1)
    if world > 1:
        dist.barrier()
    torch.manual_seed(given.seed)
    run = Run(given.folder, build_model(), torch.device(given.device), given.seed)
    for name, (train, stage) in STAGES.items():
        train(run, replace(stage, steps=max(1, round(stage.steps * given.effort))))
        if name == given.until:
            break
    if given.until == LAST:
        average_stages(run, AVERAGED)
        checkpoint = given.folder / "checkpoint"
        if rank == 0:
            run.model.half().save_pretrained(checkpoint)
            build_processor().save_pretrained(checkpoint)
            print(f"checkpoint: {checkpoint}")
        if given.test_scenes:
            evaluate(checkpoint, given.folder / "test", given.test_scenes, assets, rank, world)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
