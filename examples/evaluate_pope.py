"""Evaluates methods on POPE from Python: what `llava-sparse pope` does, for a range of budgets.

python examples/evaluate_pope.py                # 60 questions per split on the embedded reference model: seconds
python examples/evaluate_pope.py --model llava-hf/llava-1.5-7b-hf --dataset lmms-lab/POPE --budgets 64 128 192
"""

import argparse

from llava_sparse.evaluation import evaluate_pope, load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hub id or folder; the embedded reference model if left out")
parser.add_argument("--dataset", default="reference", help="reference, lmms-lab/POPE, or a folder laid out alike")
parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 192])
parser.add_argument("--limit", type=int, default=60, help="questions per split, 0 for all")
arguments = parser.parse_args()

model = load_model(arguments.model)
print("method     budget  tokens  accuracy    F1")
for budget in arguments.budgets:
    results = evaluate_pope(model, arguments.dataset, ["visionzip", "sparsevlm"], budget, limit=arguments.limit or None)
    for entry in results["methods"]:
        average = entry["average"]
        print(
            f"{entry['method']:10s} {budget:6d}  {entry['visual_tokens']:6.1f}"
            f"  {100 * average['accuracy']:8.1f}  {100 * average['f1']:4.1f}"
        )
