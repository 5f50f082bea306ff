"""Attention operators: other functions of queries, keys and values, studied on a recording beside exact attention."""

from workbench.attention.operators.agent import AgentAttention
from workbench.attention.operators.base import Operator
from workbench.attention.operators.ecoformer import EcoFormer
from workbench.attention.operators.inline import InLine
from workbench.attention.operators.lightning import Lightning
from workbench.attention.operators.local_linear import LocalLinear
from workbench.attention.operators.slab import SLAB
from workbench.attention.operators.soft import SOFT
from workbench.attention.operators.study import Study, study, study_operator

__all__ = [
    "SLAB",
    "SOFT",
    "AgentAttention",
    "EcoFormer",
    "InLine",
    "Lightning",
    "LocalLinear",
    "Operator",
    "Study",
    "study",
    "study_operator",
]
