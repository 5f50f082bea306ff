"""Measures of a run, as functions of tensors: attention, outliers, quality, memory, time."""

from workbench.core.attention_rows import RowBlock, attention_rows, row_blocks, visible_keys
from workbench.measure.attention import (
    PooledMap,
    column_sums,
    pool_rows,
    pooled_map,
    pooled_maps,
    queries_per_key,
    row_entropy,
    sink_mass,
)
from workbench.measure.grid import GridOfMaps
from workbench.measure.head_classes import HeadStats, Thresholds
from workbench.measure.heads import head_stats
from workbench.measure.memory import CudaBytes, LiveBytes, Sample, Timeline, live_bytes, tensor_bytes
from workbench.measure.outliers import (
    ChannelStats,
    LayerStats,
    MassiveActivation,
    MassiveActivations,
    Sink,
    Sinks,
    channel_stats,
    layer_stats,
    massive_activations,
    sinks,
)
from workbench.measure.quality import Quality, compare_logits, first_divergence, output_error
from workbench.measure.rounding import kernel_share, space_used
from workbench.measure.timing import Stopwatch, Timing

__all__ = [
    "ChannelStats",
    "CudaBytes",
    "GridOfMaps",
    "HeadStats",
    "LayerStats",
    "LiveBytes",
    "MassiveActivation",
    "MassiveActivations",
    "PooledMap",
    "Quality",
    "RowBlock",
    "Sample",
    "Sink",
    "Sinks",
    "Stopwatch",
    "Thresholds",
    "Timeline",
    "Timing",
    "attention_rows",
    "channel_stats",
    "column_sums",
    "compare_logits",
    "first_divergence",
    "head_stats",
    "kernel_share",
    "layer_stats",
    "live_bytes",
    "massive_activations",
    "output_error",
    "pool_rows",
    "pooled_map",
    "pooled_maps",
    "queries_per_key",
    "row_blocks",
    "row_entropy",
    "sink_mass",
    "sinks",
    "space_used",
    "tensor_bytes",
    "visible_keys",
]
