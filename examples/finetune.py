"""Fine-tunes a pruned LLaVA on the few tokens that it sees: its projector, or adapters (LoRA) of its decoder.

    pip install '.[finetune]'
    python examples/finetune.py --model llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json --images images \
        --method visionzip --budget 64 --part projector --rate 2e-5 --dtype bfloat16 --output runs/visionzip-64

Without `--data` it renders training scenes of the reference recipe and tunes the embedded reference model on them;
that needs `pip install '.[train]'`, the fonts that examples/train_reference.py names, and no network. Run the same
command again to go on where a run was stopped. `--measure` is the comparison of docs/finetuning.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from reference.scenes import NOTO, TWEMOJI, Assets
from tuning.measure import measure
from tuning.rendered import write_conversations
from tuning.training import PARTS, Tuning, tune

from llava_sparse.evaluation.model import resolve_device
from llava_sparse.reference import CHECKPOINT


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the tuned model")
    parser.add_argument("--model", default=str(CHECKPOINT), help="Hub id or folder; the reference model if left out")
    parser.add_argument("--data", type=Path, help="conversations in LLaVA's JSON; rendered ones if left out")
    parser.add_argument("--images", type=Path, help="folder of their pictures; the JSON's own if left out")
    parser.add_argument("--skip-bad", action="store_true", help="tell bad conversations and leave them out")
    parser.add_argument("--method", default="visionzip", help="how to prune, or dense")
    parser.add_argument("--budget", type=float, default=64, help="visual tokens, or a share of them; 64, 32, 16, ...")
    parser.add_argument("--part", choices=PARTS, default="projector", help="what is trained")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pictures", type=int, default=4, help="in a batch, each with all conversations about it")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="bfloat16 on a GPU, else float32")
    parser.add_argument("--four-bit", action="store_true", help="hold what is not trained in 4 bits (part lora)")
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again instead of keeping them"
    )
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=800, help="to render, without --data")
    parser.add_argument("--questions", type=int, default=8, help="about each of them")
    parser.add_argument("--noto", type=Path, default=NOTO)
    parser.add_argument("--twemoji", type=Path, default=TWEMOJI)
    parser.add_argument("--measure", action="store_true", help="tune for 16 tokens by three methods, and compare")
    parser.add_argument("--page", type=Path, help="page whose tables --measure renews")
    parser.add_argument("--limit", type=int, help="questions per split, of --measure")
    return parser.parse_args()


def main() -> None:
    given = parse()
    budget = int(given.budget) if given.budget >= 1 else given.budget
    data, images = given.data, given.images
    if data is None:
        data = write_conversations(
            given.output / "scenes", given.scenes, given.questions, Assets(given.noto, given.twemoji)
        )
        images = data.parent / "images"
    dtype = given.dtype or ("bfloat16" if resolve_device("auto").type == "cuda" else "float32")
    same = ("method", "part", "steps", "pictures", "accumulate", "rate", "rank", "four_bit", "checkpointing")
    tuning = Tuning(
        given.model, given.output, data, images or data.parent, budget=budget, dtype=dtype, seed=given.seed,
        save_every=given.save_every, skip_bad=given.skip_bad, **{name: getattr(given, name) for name in same},
    )  # fmt: skip
    if given.measure:
        measure(tuning, given.page, given.limit)
    else:
        print(f"tuned: {tune(tuning)}")


if __name__ == "__main__":
    main()
