"""Weight methods: how the model itself is made smaller."""

from workbench.weights.absmax import AbsMax
from workbench.weights.awq import AWQ
from workbench.weights.base import WeightMethod, compressed
from workbench.weights.bitstack import BitStack
from workbench.weights.cfsp import CFSP
from workbench.weights.comp import COMP
from workbench.weights.coreinfer import CoreInfer
from workbench.weights.cospadi import CoSpaDi
from workbench.weights.crossquant import CrossQuant
from workbench.weights.denseshift import DenseShift
from workbench.weights.double_rounding import DoubleRounding
from workbench.weights.easyquant import EasyQuant
from workbench.weights.evopress import EvoPress
from workbench.weights.flashsvd import FlashSVD
from workbench.weights.foldgpt import FoldGPT
from workbench.weights.fwsvd import FWSVD
from workbench.weights.gptq import GPTQ
from workbench.weights.greenformers import Greenformers
from workbench.weights.hqq import HQQ
from workbench.weights.magnitude import Magnitude
from workbench.weights.modegpt import MoDeGPT
from workbench.weights.odyssey import Odyssey
from workbench.weights.ostquant import OSTQuant
from workbench.weights.owq import OWQ
from workbench.weights.pb_llm import PBLLM
from workbench.weights.rtn import RTN
from workbench.weights.slim_llm import SliMLLM
from workbench.weights.sparsegpt import SparseGPT
from workbench.weights.svd import SVD
from workbench.weights.transact import TransAct
from workbench.weights.udfc import UDFC
from workbench.weights.vptq import VPTQ
from workbench.weights.vq_logits import VQLogits
from workbench.weights.wanda import Wanda
from workbench.weights.ziplm import ZipLM

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
