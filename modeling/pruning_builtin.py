"""The package's methods, which register themselves when they are imported; a new one adds a line."""

from .method_cdpruner import CDPruner
from .method_delegate import Delegate
from .method_divprune import DivPrune
from .method_eadp import EADP
from .method_fastv import FastV
from .method_grid import PooledTokens, UniformTokens
from .method_pyramiddrop import PyramidDrop
from .method_random import RandomDecoder, RandomTokens
from .method_scope import Scope
from .method_sparsevlm import SparseVLM
from .method_tome import ToMe
from .method_visionzip import VisionZip
from .method_vispruner import VisPruner

__all__ = [
    "EADP",
    "CDPruner",
    "Delegate",
    "DivPrune",
    "FastV",
    "PooledTokens",
    "PyramidDrop",
    "RandomDecoder",
    "RandomTokens",
    "Scope",
    "SparseVLM",
    "ToMe",
    "UniformTokens",
    "VisPruner",
    "VisionZip",
]
