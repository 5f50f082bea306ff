"""KV-cache methods: which tokens stay, and how they are stored."""

from workbench.kv.methods.allocate.adakv import AdaKV
from workbench.kv.methods.allocate.cake import CAKE
from workbench.kv.methods.allocate.dynamickv import DynamicKV
from workbench.kv.methods.allocate.evopress import EvoPressKV
from workbench.kv.methods.allocate.hack import HACK
from workbench.kv.methods.allocate.headkv import HeadKV, HeadKVR2
from workbench.kv.methods.allocate.prefixkv import PrefixKV
from workbench.kv.methods.allocate.pyramidkv import PyramidKV
from workbench.kv.methods.allocate.scalekv import ScaleKV
from workbench.kv.methods.allocate.simlayerkv import SimLayerKV
from workbench.kv.methods.allocate.uncomp import UNComp
from workbench.kv.methods.chunked.epicache import EpiCache
from workbench.kv.methods.chunked.ilre import ILRe
from workbench.kv.methods.chunked.infllm import InfLLM
from workbench.kv.methods.chunked.livevlm import LiveVLM
from workbench.kv.methods.chunked.streammem import StreamMem
from workbench.kv.methods.chunked.video_xl_2 import VideoXL2
from workbench.kv.methods.chunked.xl3m import XL3M
from workbench.kv.methods.cross_layer.minicache import MiniCache
from workbench.kv.methods.evict.capkv import CapKV
from workbench.kv.methods.evict.chunkkv import ChunkKV
from workbench.kv.methods.evict.compactor import Compactor
from workbench.kv.methods.evict.criticalkv import CriticalKV
from workbench.kv.methods.evict.curdkv import CurDKV
from workbench.kv.methods.evict.decoding import Decoding
from workbench.kv.methods.evict.expected_attention import ExpectedAttention
from workbench.kv.methods.evict.h2o import H2O
from workbench.kv.methods.evict.keydiff import KeyDiff
from workbench.kv.methods.evict.knorm import Knorm
from workbench.kv.methods.evict.kvzip import KVzip
from workbench.kv.methods.evict.lagkv import LagKV
from workbench.kv.methods.evict.lazyeviction import LazyEviction
from workbench.kv.methods.evict.qfilters import QFilters
from workbench.kv.methods.evict.r_kv import RKV
from workbench.kv.methods.evict.snapkv import SnapKV
from workbench.kv.methods.evict.streaming_llm import StreamingLLM
from workbench.kv.methods.evict.tova import TOVA
from workbench.kv.methods.full import Full
from workbench.kv.methods.low_rank.cskv import CSKV
from workbench.kv.methods.low_rank.eigen_attention import EigenAttention
from workbench.kv.methods.merge.ems import EMS
from workbench.kv.methods.merge.look_m import LookM
from workbench.kv.methods.offload.a2ats import A2ATS
from workbench.kv.methods.offload.alisa import ALISA
from workbench.kv.methods.offload.kcache import KCache
from workbench.kv.methods.offload.retrievalattention import RetrievalAttention
from workbench.kv.methods.offload.sentencekv import SentenceKV
from workbench.kv.methods.offload.tailorkv import TailorKV
from workbench.kv.methods.quantise.fireq import FireQ
from workbench.kv.methods.quantise.kivi import KIVI
from workbench.kv.methods.quantise.kvtuner import KVTuner
from workbench.kv.methods.quantise.mikv import MiKV
from workbench.kv.methods.quantise.turbomind import TurboMind
from workbench.kv.methods.quantise.vkv_1bit import VisualKV1Bit
from workbench.kv.methods.quantise.zipcache import ZipCache
from workbench.kv.methods.select.quest import Quest
from workbench.kv.methods.sparse.deltallm import DeltaLLM
from workbench.kv.methods.sparse.mustafar import Mustafar
from workbench.kv.methods.sparse.think import ThinK

__all__ = [
    "A2ATS",
    "ALISA",
    "CAKE",
    "CSKV",
    "EMS",
    "H2O",
    "HACK",
    "KIVI",
    "RKV",
    "TOVA",
    "XL3M",
    "AdaKV",
    "CapKV",
    "ChunkKV",
    "Compactor",
    "CriticalKV",
    "CurDKV",
    "Decoding",
    "DeltaLLM",
    "DynamicKV",
    "EigenAttention",
    "EpiCache",
    "EvoPressKV",
    "ExpectedAttention",
    "FireQ",
    "Full",
    "HeadKV",
    "HeadKVR2",
    "ILRe",
    "InfLLM",
    "KCache",
    "KVTuner",
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "LazyEviction",
    "LiveVLM",
    "LookM",
    "MiKV",
    "MiniCache",
    "Mustafar",
    "PrefixKV",
    "PyramidKV",
    "QFilters",
    "Quest",
    "RetrievalAttention",
    "ScaleKV",
    "SentenceKV",
    "SimLayerKV",
    "SnapKV",
    "StreamMem",
    "StreamingLLM",
    "TailorKV",
    "ThinK",
    "TurboMind",
    "UNComp",
    "VideoXL2",
    "VisualKV1Bit",
    "ZipCache",
]
