"""What a run was measured to be, in the columns of results."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from workbench.results.schema import Row

if TYPE_CHECKING:
    from workbench.measure.quality import Quality
    from workbench.runtime.run import Run
    from workbench.trace import Trace
    from workbench.weights.variants import Variants


def prompt_hash(trace: Trace) -> str:
    """What tells a prompt's token ids from others'."""
    return hashlib.sha256(trace.ids.cpu().numpy().tobytes()).hexdigest()[:32]


def bytes_of(run: Run, variants: Variants) -> Row:
    """A run's bytes: its cache, states, the weights as they lie in memory and as deployed, totals, the peak."""
    plan, weights = run.plan, run.recipe.family("weights")
    live, deployed = variants.nbytes(weights), variants.deployed_nbytes(weights)
    cache = plan.nbytes + plan.state_nbytes
    return {
        "kv_nbytes": plan.nbytes,
        "kv_full_nbytes": plan.full_nbytes,
        "kv_host_nbytes": plan.host_nbytes,
        "state_nbytes": plan.state_nbytes,
        "weight_nbytes": live,
        "weight_deployed_nbytes": deployed,
        "total_nbytes": cache + live,
        "deployed_nbytes": cache + deployed,
        "peak_nbytes": run.memory.device_peak,
        "kv_share": plan.share,
        "score_share": plan.trace.score_share,
    }


def quality_of(figures: Quality) -> Row:
    """How far a run is from the uncompressed one."""
    return {
        "kl": figures.kl,
        "kl_max": figures.kl_max,
        "top1": figures.top1_agreement,
        "nll": figures.nll,
        "nll_reference": figures.nll_reference,
        "nll_difference": figures.nll_difference,
        "perplexity": figures.perplexity,
    }


def times_of(run: Run) -> Row:
    """How long a run's reply took, in seconds, and its decoding speed."""
    timing = run.timing
    return {
        "first_token_s": timing.first_token_s,
        "decode_s": timing.decode_s,
        "tokens_per_s": timing.tokens_per_s,
    }
