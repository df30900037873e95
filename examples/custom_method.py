"""A method of your own, registered in one call: the patches of largest norm stay.

Runs offline on the embedded reference model; the file is also a plugin of the command line:

    python examples/custom_method.py
    llava-sparse pope --plugin examples/custom_method.py --methods norm,visionzip --budget 64 --limit 100
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

import llava_sparse
from llava_sparse.modeling.pruning_methods import EncoderSparsifier
from llava_sparse.modeling.pruning_settings import option
from llava_sparse.modeling.pruning_types import VisionFeatures, VisualTokens


@llava_sparse.register_method
@dataclass(frozen=True)
class Norm(EncoderSparsifier):
    """Score of a patch = length of its feature, behind the layer that LLaVA takes its features from."""

    name = "norm"
    summary = "keeps the patches whose features are longest, or shortest"

    shortest: bool = option(False, "whether the shortest stay instead")

    def reduce(self, vision: VisionFeatures) -> VisualTokens:
        scores = vision.features.float().norm(dim=-1)
        order = scores.argsort(dim=-1, descending=not self.shortest, stable=True)
        return VisualTokens.kept(vision.features, order[:, : self.tokens].sort(dim=-1).values, scores)


def main() -> None:
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from llava_sparse.reference import CHECKPOINT, SCENES

    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    image = Image.open(SCENES / "images" / "scene_000066.jpg")
    inputs = processor(images=image, text="USER: <image>\nIs there a car in the image? ASSISTANT:", return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(
        CHECKPOINT, sparse_method="norm", sparse_budget=64, dtype=torch.float32
    )
    for method, options in (("norm", {"shortest": True}), ("norm", None), ("norm+fastv", None)):
        model.set_sparsity(method, budget=64, options=options)
        with torch.no_grad():
            stages = model(**inputs, output_selection=True).selection
        kept = ", ".join(f"{stage.kept.shape[1]} of {stage.scores.shape[1]}" for stage in stages)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"{method}, {options or 'default options'}: {kept} tokens kept: {answer}")


if __name__ == "__main__":
    main()
