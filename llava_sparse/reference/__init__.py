"""The embedded reference model and its question set: a small trained LLaVA and 3 x 1,200 POPE questions.

`CHECKPOINT` is a folder that `from_pretrained` loads, `SCENES` a question folder; the README beside says how both were
made and what was measured on them.
"""

from pathlib import Path

CHECKPOINT: Path = Path(__file__).parent / "checkpoint"
SCENES: Path = Path(__file__).parent / "scenes"
