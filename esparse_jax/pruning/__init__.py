"""The paper's section 3: statistics, metric, shuffle and mask, arrays in and arrays out."""

from esparse_jax.pruning.linear import (
    METHODS,
    LinearRecord,
    PruneConfig,
    Pruned,
    layer_metric,
    prune_linear,
)
from esparse_jax.pruning.mask import NMPattern, is_nm, nm_mask, nm_violations, retained_metric
from esparse_jax.pruning.metric import esparse_metric, magnitude_metric, wanda_metric
from esparse_jax.pruning.shuffle import (
    SHUFFLES,
    channel_shuffle,
    global_naive_shuffle,
    local_block_shuffle,
)
from esparse_jax.pruning.stats import (
    AMPLITUDES,
    BIN_SPANS,
    ChannelRange,
    ChannelStats,
    amplitude,
    bin_range,
    information_richness,
    init_range,
    init_stats,
    merge_range,
    merge_stats,
    update_range,
    update_stats,
)

__all__ = [
    "AMPLITUDES",
    "BIN_SPANS",
    "METHODS",
    "SHUFFLES",
    "ChannelRange",
    "ChannelStats",
    "LinearRecord",
    "NMPattern",
    "PruneConfig",
    "Pruned",
    "amplitude",
    "bin_range",
    "channel_shuffle",
    "esparse_metric",
    "global_naive_shuffle",
    "information_richness",
    "init_range",
    "init_stats",
    "is_nm",
    "layer_metric",
    "local_block_shuffle",
    "magnitude_metric",
    "merge_range",
    "merge_stats",
    "nm_mask",
    "nm_violations",
    "prune_linear",
    "retained_metric",
    "update_range",
    "update_stats",
    "wanda_metric",
]
