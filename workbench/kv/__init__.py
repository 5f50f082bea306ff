"""KV-cache methods: which tokens stay, and how they are stored."""

from workbench.kv.a2ats import A2ATS
from workbench.kv.adakv import AdaKV
from workbench.kv.alisa import ALISA
from workbench.kv.cskv import CSKV
from workbench.kv.deltallm import DeltaLLM
from workbench.kv.eigen_attention import EigenAttention
from workbench.kv.ems import EMS
from workbench.kv.epicache import EpiCache
from workbench.kv.evopress import EvoPressKV
from workbench.kv.expected_attention import ExpectedAttention
from workbench.kv.fireq import FireQ
from workbench.kv.full import Full
from workbench.kv.h2o import H2O
from workbench.kv.hack import HACK
from workbench.kv.headkv import HeadKV, HeadKVR2
from workbench.kv.ilre import ILRe
from workbench.kv.infllm import InfLLM
from workbench.kv.kcache import KCache
from workbench.kv.keydiff import KeyDiff
from workbench.kv.kivi import KIVI
from workbench.kv.knorm import Knorm
from workbench.kv.kvzip import KVzip
from workbench.kv.lagkv import LagKV
from workbench.kv.lazyeviction import LazyEviction
from workbench.kv.livevlm import LiveVLM
from workbench.kv.look_m import LookM
from workbench.kv.mikv import MiKV
from workbench.kv.mustafar import Mustafar
from workbench.kv.prefixkv import PrefixKV
from workbench.kv.pyramidkv import PyramidKV
from workbench.kv.retrievalattention import RetrievalAttention
from workbench.kv.scalekv import ScaleKV
from workbench.kv.sentencekv import SentenceKV
from workbench.kv.snapkv import SnapKV
from workbench.kv.streaming_llm import StreamingLLM
from workbench.kv.streammem import StreamMem
from workbench.kv.tailorkv import TailorKV
from workbench.kv.think import ThinK
from workbench.kv.tova import TOVA
from workbench.kv.turbomind import TurboMind
from workbench.kv.uncomp import UNComp
from workbench.kv.video_xl_2 import VideoXL2
from workbench.kv.vkv_1bit import VisualKV1Bit
from workbench.kv.xl3m import XL3M
from workbench.kv.zipcache import ZipCache

__all__ = [
    "A2ATS",
    "ALISA",
    "CSKV",
    "EMS",
    "H2O",
    "HACK",
    "KIVI",
    "TOVA",
    "XL3M",
    "AdaKV",
    "DeltaLLM",
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
    "KVzip",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "LazyEviction",
    "LiveVLM",
    "LookM",
    "MiKV",
    "Mustafar",
    "PrefixKV",
    "PyramidKV",
    "RetrievalAttention",
    "ScaleKV",
    "SentenceKV",
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
