"""Weight methods: how the model itself is made smaller.

A method never touches the model: `compress.compressed` makes a twin that shares every tensor and puts small layers in
the place of plain ones. `variants` keeps the last twin, and what was learnt about the model. A budget is a share of
the 16-bit bytes of the decoder's matrices that a method is for; what it cannot take there (fused experts) counts at
full size. Quantisers are as small as their bits and groups make them, and a budget is only held against that; pruning
and low rank are as small as their budget says. Scales, zeros, bitmaps and indices are counted.

Methods of a recipe are applied in the order of their stages, whatever the order they are named in (`stages`): modules
become smaller, weights are transformed, replaced by products, left out, rounded, and last what enters them is rounded.
Each is calibrated on, and given, what those before it left: factors are plain layers to it, and pruned weights plain
layers with zeros that stay zero. So `quarot | gptq`, `wanda | gptq`, `svd | rtn` and `absmax | activations` mean
something, and what could undo an earlier method is refused.

Layers share bytes out in one of two ways: all get the largest rank within the same share of theirs, or each has a
ladder of sizes and the next bytes go where they lower the relative error most. A shortened model counts its layers
from zero, so stores, plans and caches need to know nothing; its config says where each layer came from
(`models.depth`).
"""

from workbench.weights.base import WeightMethod
from workbench.weights.compress import compressed
from workbench.weights.methods.any_size.bitstack import BitStack
from workbench.weights.methods.any_size.double_rounding import DoubleRounding
from workbench.weights.methods.any_size.evopress import EvoPress
from workbench.weights.methods.any_size.evopress_depth import EvoPressDepth
from workbench.weights.methods.low_rank.cospadi import CoSpaDi
from workbench.weights.methods.low_rank.flashsvd import FlashSVD
from workbench.weights.methods.low_rank.fwsvd import FWSVD
from workbench.weights.methods.low_rank.greenformers import Greenformers
from workbench.weights.methods.low_rank.svd import SVD
from workbench.weights.methods.low_rank.svd_llm import SVDLLM
from workbench.weights.methods.prune.magnitude import Magnitude
from workbench.weights.methods.prune.sparsegpt import SparseGPT
from workbench.weights.methods.prune.wanda import Wanda
from workbench.weights.methods.quantise.absmax import AbsMax
from workbench.weights.methods.quantise.activations import Activations
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
from workbench.weights.methods.transform.quarot import QuaRot
from workbench.weights.reports.product_times import recorded_times

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
    "SVDLLM",
    "UDFC",
    "VPTQ",
    "AbsMax",
    "Activations",
    "BitStack",
    "CoSpaDi",
    "CoreInfer",
    "CrossQuant",
    "DenseShift",
    "DoubleRounding",
    "EasyQuant",
    "EvoPress",
    "EvoPressDepth",
    "FlashSVD",
    "FoldGPT",
    "Greenformers",
    "Magnitude",
    "MoDeGPT",
    "OSTQuant",
    "Odyssey",
    "QuaRot",
    "SliMLLM",
    "SparseGPT",
    "TransAct",
    "VQLogits",
    "Wanda",
    "WeightMethod",
    "ZipLM",
    "compressed",
    "recorded_times",
]
