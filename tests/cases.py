"""The one table of methods that the shared tests cross with everything a user does. A new method adds a row."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """A method with settings for the tiny model: 16 patches, 6 encoder layers, 6 decoder layers.

    Attributes:
        settings: arguments of `set_sparsity`.
        fixed: whether the number of tokens kept is the same for every prompt.
        lengths: visual tokens that each decoder layer holds of one image.
        slow: of a method that goes the same way through the model as another row, or of one that a row has already:
            crossed with all that users do in the slow tests alone.
    """

    name: str
    method: str
    settings: dict = field(hash=False)
    lengths: list[int] | None = field(hash=False, default=None)
    slow: bool = False

    @property
    def config(self) -> dict:
        """The settings as configuration fields."""
        return {"sparse_method": self.method, **{f"sparse_{key}": value for key, value in self.settings.items()}}


CASES = [
    Case("visionzip", "visionzip", {"budgets": [4, 2]}, lengths=[6] * 6),
    Case("visionzip-budget", "visionzip", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case(
        "sparsevlm",
        "sparsevlm",
        {"layers": [0, 2, 3], "budgets": [8, 5, 2]},
        # 8 of 16 kept, 3 recycled into 1; 5 of 9 kept, 2 into 1; 2 of 6 kept, 2 into 1.
        lengths=[16, 9, 9, 6, 3, 3],
    ),
    Case("sparsevlm-budget", "sparsevlm", {"budget": 4}, slow=True),
    Case(
        "sparsevlm-2.0",
        "sparsevlm",
        {"layers": [1, 2, 3], "budgets": [8, 5, 2], "options": {"version": "2.0"}},
        lengths=[16, 16, 8, 5, 2, 2],
        slow=True,
    ),
    Case(
        "sparsevlm-original",
        "sparsevlm",
        {"layers": [1, 3], "budgets": [6, 3], "options": {"positions": "original"}},
        # 6 of 16 kept, 4 recycled into 1; 3 of 7 kept, 2 into 1.
        lengths=[16, 16, 7, 7, 4, 4],
        slow=True,
    ),
    Case(
        "sparsevlm-1.0",
        "sparsevlm",
        {"layers": [1, 2], "options": {"version": "1.0", "scale": 2.0, "bias": 1.0}},
        slow=True,
    ),
    Case("sparsevlm-1.0-paper", "sparsevlm", {"layers": [1, 2], "options": {"version": "1.0", "lam": 0.7}}, slow=True),
    Case(
        "sparsevlm-ablated",
        "sparsevlm",
        {"layers": [0, 2, 3], "budgets": [8, 5, 2], "options": {"raters": "all", "recycle": False}},
        lengths=[16, 8, 8, 5, 2, 2],
        slow=True,
    ),
    Case("random", "random", {"budget": 5, "options": {"seed": 3}}, lengths=[5] * 6, slow=True),
    Case("cdpruner", "cdpruner", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case("delegate", "delegate", {"budget": 8}, lengths=[8] * 6),
    Case("divprune", "divprune", {"budget": 0.3}, lengths=[5] * 6, slow=True),
    Case("eadp", "eadp", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case("fastv", "fastv", {"layers": [1], "budgets": [6]}, lengths=[16, 16, 6, 6, 6, 6], slow=True),
    Case("pool", "pool", {"budget": 6}, lengths=[6] * 6, slow=True),
    # Right before layers 2 and 4.
    Case("pyramiddrop", "pyramiddrop", {"layers": [2, 4], "budgets": [6, 3]}, lengths=[16, 16, 6, 6, 3, 3]),
    Case("scope", "scope", {"budget": 5, "options": {"alpha": 2.0}}, lengths=[5] * 6, slow=True),
    Case("tome", "tome", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case("uniform", "uniform", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case("vispruner", "vispruner", {"budget": 5}, lengths=[5] * 6, slow=True),
    Case(
        "divprune+fastv",
        "divprune+fastv",
        {"budgets": [[9], [4]]},
        lengths=[9, 9, 4, 4, 4, 4],
        slow=True,
    ),
    Case(
        "visionzip+sparsevlm",
        "visionzip+sparsevlm",
        {"layers": [None, [0, 2, 3]], "budgets": [[9, 3], [8, 5, 2]]},
        # 8 of 12 kept, 2 recycled into 1; 5 of 9 kept, 2 into 1; 2 of 6 kept, 2 into 1.
        lengths=[12, 9, 9, 6, 3, 3],
        slow=True,
    ),
    Case("tome+delegate", "tome+delegate", {"budget": 4}, lengths=[4] * 6, slow=True),
    Case(
        "tome+divprune+fastv",
        "tome+divprune+fastv",
        {"budget": [8, 6, None], "layers": [None, None, [1]], "budgets": [None, None, [3]]},
        lengths=[6, 6, 3, 3, 3, 3],
        slow=True,
    ),
    Case("random_decoder", "random_decoder", {"layers": [1, 3], "budgets": [6, 3]}, [16, 16, 6, 6, 3, 3], slow=True),
]
