"""Weight methods: how the model itself is made smaller."""

from workbench.weights.base import WeightMethod, compressed
from workbench.weights.hqq import HQQ
from workbench.weights.transact import TransAct

__all__ = ["HQQ", "TransAct", "WeightMethod", "compressed"]
