"""Lets a torchvision that was built for CUDA be imported beside a torch without it: PyPI has no other.

    python .ci/torchvision_without_cuda.py      # in the environment that it is about; changes nothing where all is well

Two of its operators are declared, and remain without code; image transforms, which is what vLLM imports, need none.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

DECLARED = """

if not _has_ops():
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> bool:
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode == 0


if __name__ == "__main__":
    spec = find_spec("torchvision")
    if spec is not None and not imports():
        file = Path(str(spec.origin)).with_name("extension.py")
        file.write_text(file.read_text() + DECLARED)
        sys.exit(None if imports() else f"{file.parent}: cannot be imported")
