"""Weight methods: how the model itself is made smaller."""

from workbench.weights.base import WeightMethod
from workbench.weights.compress import compressed
from workbench.weights.methods.any_size.bitstack import BitStack
from workbench.weights.methods.any_size.double_rounding import DoubleRounding
from workbench.weights.methods.any_size.evopress import EvoPress
from workbench.weights.methods.low_rank.cospadi import CoSpaDi
from workbench.weights.methods.low_rank.flashsvd import FlashSVD
from workbench.weights.methods.low_rank.fwsvd import FWSVD
from workbench.weights.methods.low_rank.greenformers import Greenformers
from workbench.weights.methods.low_rank.svd import SVD
from workbench.weights.methods.prune.magnitude import Magnitude
from workbench.weights.methods.prune.sparsegpt import SparseGPT
from workbench.weights.methods.prune.wanda import Wanda
from workbench.weights.methods.quantise.absmax import AbsMax
from workbench.weights.methods.quantise.awq import AWQ
from workbench.weights.methods.quantise.crossquant import CrossQuant
from workbench.weights.methods.quantise.denseshift import DenseShift
from workbench.weights.methods.quantise.easyquant import EasyQuant
from workbench.weights.methods.quantise.gptq import GPTQ
from workbench.weights.methods.quantise.hqq import HQQ
from workbench.weights.methods.quantise.odyssey import Odyssey
from workbench.weights.methods.quantise.ostquant import OSTQuant
from workbench.weights.methods.quantise.owq import OWQ
from workbench.weights.methods.quantise.pb_llm import PBLLM
from workbench.weights.methods.quantise.rtn import RTN
from workbench.weights.methods.quantise.slim_llm import SliMLLM
from workbench.weights.methods.quantise.vptq import VPTQ
from workbench.weights.methods.quantise.vq_logits import VQLogits
from workbench.weights.methods.structured.cfsp import CFSP
from workbench.weights.methods.structured.comp import COMP
from workbench.weights.methods.structured.coreinfer import CoreInfer
from workbench.weights.methods.structured.foldgpt import FoldGPT
from workbench.weights.methods.structured.modegpt import MoDeGPT
from workbench.weights.methods.structured.transact import TransAct
from workbench.weights.methods.structured.udfc import UDFC
from workbench.weights.methods.structured.ziplm import ZipLM

__all__ = [
    "AWQ",
    "CFSP",
    "COMP",
    "FWSVD",
    "GPTQ",
    "HQQ",
    "OWQ",
    "PBLLM",
    "RTN",
    "SVD",
    "UDFC",
    "VPTQ",
    "AbsMax",
    "BitStack",
    "CoSpaDi",
    "CoreInfer",
    "CrossQuant",
    "DenseShift",
    "DoubleRounding",
    "EasyQuant",
    "EvoPress",
    "FlashSVD",
    "FoldGPT",
    "Greenformers",
    "Magnitude",
    "MoDeGPT",
    "OSTQuant",
    "Odyssey",
    "SliMLLM",
    "SparseGPT",
    "TransAct",
    "VQLogits",
    "Wanda",
    "WeightMethod",
    "ZipLM",
    "compressed",
]
