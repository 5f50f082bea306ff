"""Where a layer's keys and values live: stores take tokens, attend, own their positions and count their bytes.

All are built from `Rows`: for each KV head some rows of one width in one contiguous buffer, with room reserved once
and grown by blocks. While all heads are equally long, lengths are plain numbers and reading is a view; otherwise
starts and lengths are int32 tensors, as a kernel wants them. Nothing loops over tokens or heads in Python.

`DenseStore` holds rows at one precision, ragged where heads differ, and what an evicting method knows of each entry;
`SlidingStore` a window, `ChunkStore` the newest chunk (Llama 4); `LatentStore` rows of which all heads make their keys
and values (MLA), in another store; `PackedStore` codes of 2, 4 or 8 bits with a
full-precision tail; `FrozenStore` codes that never move; `BitmapStore` the largest numbers of every row
(Mustafar); `PrunedStore` keys without their least used channels (ThinK); `MixedStore` important entries exact and the
others at few bits; `SmoothedStore` smoothed integers (FireQ); `DeltaStore` differences between neighbours (DeltaLLM);
`LowRankStore` coefficients (Eigen Attention, CSKV);
`CalibratedStore` a stretch of tokens at one bit, whose scores it lowers (CalibQuant);
`MergedLayerStore` what two layers have in common, and a layer's own (MiniCache); `SplitStore` several stores over
different positions; `SharedStore` nothing, for it attends to another layer's store; `ClosedUpStore` any of them whose
entries stand by their place in the cache (StreamingLLM).

What has a part in host memory is a `TieredStore`: `OffloadStore` with an index that finds what a query needs, of which
`RecomputedRows` hold a part nowhere and compute it again (ALISA),
`HostValuesStore` (KCache), `BlockStore` and `LevelStore` (InfLLM, Video-XL-2). `PagedStore` has pages of which a
question opens some (LiveVLM); of what a `SelectingStore` holds each new token attends to a part (Quest). Budgets limit
the device; host memory is counted apart, in categories that begin with "host ", is pinned where a GPU works, and is
copied on a stream of its own.

On a CPU a store dequantises and calls the reference in `workbench_kernels`. On a GPU a kernel of the same signature
takes its place where the model computes in 16 bits. What a store has `in_place` a CPU's compiled step reads as it lies.
"""

from workbench.kv.stores.closed_up import ClosedUpStore
from workbench.kv.stores.dense import ChunkStore, DenseStore, SlidingStore
from workbench.kv.stores.latent import LatentStore
from workbench.kv.stores.packed import PackedStore
from workbench.kv.stores.shared import SharedStore, cloned
from workbench.kv.stores.split import SplitStore
from workbench.kv.stores.store import Dequantised, Store, kv_categories

Contents = Dequantised  # as it was called before

__all__ = [
    "ChunkStore",
    "ClosedUpStore",
    "Contents",
    "DenseStore",
    "Dequantised",
    "LatentStore",
    "PackedStore",
    "SharedStore",
    "SlidingStore",
    "SplitStore",
    "Store",
    "cloned",
    "kv_categories",
]
