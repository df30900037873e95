"""How the tests that are crossed over families make models and batches, and ask them."""

from __future__ import annotations

from functools import lru_cache

import torch
from family_cases import Family

import llava_sparse

NEW = 4
LOGITS = dict(rtol=0, atol=2e-4)


@lru_cache(maxsize=1)
def pruned(family: Family, method: str):
    """A model for tests that leave it as it is."""
    return llava_sparse.sparsify(family.make(), method, family.budget)


def settings(family: Family, method: str) -> dict:
    return {"sparse_method": method, "sparse_budget": family.budget}


def batch_of(family: Family, texts=None, seed: int = 0, **sparse) -> dict:
    return family.inputs(family.processor(**sparse), family.texts if texts is None else texts, seed)


def singles(family: Family, **sparse) -> list[dict]:
    """The prompts of `batch_of`, each alone, with the pictures that it has there."""
    found, seed = [], 0
    for text in family.texts:
        found.append(batch_of(family, [text], seed, **sparse))
        seed += text.count("<image>") + text.count("<video>")
    return found


def placeholders(model) -> list[int]:
    """What no answer may hold: it would ask for a picture."""
    ids = vars(model.config)
    return [
        ids[f"{kind}_token_{end}"]
        for kind in ("image", "video")
        for end in ("id", "index")
        if f"{kind}_token_{end}" in ids
    ]


def tokens(model, batch, **kwargs) -> torch.Tensor:
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, **kwargs}
    kwargs["suppress_tokens"] = placeholders(model)
    return model.generate(**batch, **kwargs)[:, batch["input_ids"].shape[1] :]


@torch.no_grad()
def last(model, batch) -> torch.Tensor:
    return model(**batch).logits[:, -1]
