"""Weight methods: how the model itself is made smaller."""

from workbench.weights.base import WeightMethod, compressed
from workbench.weights.flashsvd import FlashSVD
from workbench.weights.gptq import GPTQ
from workbench.weights.hqq import HQQ
from workbench.weights.rtn import RTN
from workbench.weights.svd import SVD
from workbench.weights.transact import TransAct

__all__ = ["GPTQ", "HQQ", "RTN", "SVD", "FlashSVD", "TransAct", "WeightMethod", "compressed"]
