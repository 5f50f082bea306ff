"""Where a plan's tensors really live."""

from workbench.kv.stores.dense import DenseStore, SlidingStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.shared import SharedStore, cloned
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Contents, Store, kv_categories

__all__ = [
    "Contents",
    "DenseStore",
    "PackedStore",
    "SharedStore",
    "SlidingStore",
    "SplitStore",
    "Store",
    "cloned",
    "kv_categories",
]
