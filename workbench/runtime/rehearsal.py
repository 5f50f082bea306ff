"""A recipe played through in small, beside the reading of a prompt, so that its kernels are compiled when it is run.

Which variants of which kernels a recipe needs depends on heads, sizes, precisions and lengths, and on what its stores
do with them. So nothing is listed: a model of two narrow layers with the heads of the real one reads as many random
tokens, plans by the recipe and takes a few steps, in a thread of its own. Triton keeps what was compiled in its cache,
once for a machine; a seal in the cache folder says that this was done.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from workbench.engine.attention_hook import device_of
from workbench.errors import NotApplicable
from workbench.models import Facts, LoadedModel, cache_dir, facts
from workbench.progress import Progress
from workbench.recipe import Recipe
from workbench.runtime.compiling import STAGE
from workbench.runtime.conversation import Conversation
from workbench.runtime.cuda_graph import CapturedStep, refusal
from workbench.runtime.readings import Readings
from workbench.version import __version__
from workbench_kernels.dispatch import triton_found

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

_LONGEST = 20480  # tokens at most: at a quarter of them kernels for long rows are taken, where those are others
_LAYERS, _VOCABULARY, _NARROW = 2, 64, 64
_STEPS = 4
_SPARE = 4  # times what it takes, that must be free on the device
_POLL_S = 0.1

Look = Callable[[Readings], object]


@dataclass
class Rehearsal:
    """A rehearsal that goes on; whatever goes wrong in it is no matter."""

    thread: threading.Thread = field(repr=False)
    progress: Progress = field(default_factory=Progress, repr=False)

    def finish(self, progress: Progress | None = None) -> None:
        """Wait until it is over, which is reported as compiling. Raises Cancelled, and lets it stop then."""
        progress = progress or Progress()
        while self.thread.is_alive():
            self.thread.join(_POLL_S)
            if progress.cancelled:
                self.progress.cancel()
            progress.update(STAGE, 0, 1)


def begin(
    model: PreTrainedModel, known: Facts, tokens: int, recipe: Recipe, dtype: torch.dtype, *looks: Look
) -> Rehearsal | None:
    """Begin to rehearse a recipe on a prompt of so many tokens; None where there is nothing to compile.

    That is without a GPU or Triton, with little room on the device, or where the same was done before on this machine.
    dtype: of the caches. looks: what else is done with the readings. What it allocates counts in what is measured of
    the device meanwhile.
    """
    device = device_of(model)
    if device.type != "cuda" or not triton_found():
        return None
    seal = cache_dir() / "kernels" / _key(known, tokens, recipe, dtype, model.dtype, device)
    row = (known.heads + 2 * known.kv_heads) * known.head_dim * model.dtype.itemsize
    if seal.exists() or torch.cuda.mem_get_info(device)[0] < _SPARE * _LAYERS * min(tokens, _LONGEST) * row:
        return None
    progress = Progress()

    def work() -> None:
        with suppress(Exception), torch.cuda.stream(torch.cuda.Stream(device)):
            rehearse(known, tokens, recipe, dtype, model.dtype, device, progress, *looks)
            _done(seal)

    thread = threading.Thread(target=work, name="rehearsal", daemon=True)
    thread.start()
    return Rehearsal(thread, progress)


def rehearse(
    known: Facts,
    tokens: int,
    recipe: Recipe,
    dtype: torch.dtype,
    precision: torch.dtype,
    device: torch.device,
    progress: Progress | None = None,
    *looks: Look,
) -> None:
    """Read, plan, take a few steps and look, on two layers with the heads of `known`, in the precision of its model."""
    model = _narrow(known, tokens, precision, device)
    readings = Readings(LoadedModel(model, None, "a rehearsal", facts(model)), dtype, trusted=True)
    count = min(tokens, _LONGEST + tokens % 16)  # kernels are compiled apart for lengths that 16 divides
    readings.read(torch.arange(count) % _VOCABULARY, progress=progress)
    kept = Recipe(tuple(method for method in recipe.methods if method.family != "weights"), recipe.budget)
    plan = readings.plan(kept, readings.trace(kept, progress), progress)
    playing = Conversation(
        recipe=kept,
        plan=plan,
        model=model,
        weight_nbytes=0,
        plain=None,
        plain_model=model,
        facts=readings.facts,
        tokenizer=None,
        notes=(),
        on_run=lambda _: None,
    )
    decoder = playing.decoder()
    decoder.progress = progress
    decoder.reserve(3 * _STEPS)
    for token in range(_STEPS):
        decoder.feed(torch.tensor([token]))
    if device.type == "cuda" and refusal(decoder, _STEPS) is None:
        with suppress(NotApplicable):  # stores say it of themselves
            step = CapturedStep(decoder, 0, _STEPS, graph=False)  # as it will be captured, with the same kernels
            step()
            step()
    for look in looks:
        look(readings)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _narrow(known: Facts, tokens: int, precision: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of two layers with these heads, and little else."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: Any = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=_NARROW,
        intermediate_size=_NARROW,
        num_hidden_layers=_LAYERS,
        num_attention_heads=known.heads,
        num_key_value_heads=known.kv_heads,
        head_dim=known.head_dim,
        max_position_embeddings=tokens + 64 * _STEPS,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.device("meta"):  # nothing is drawn from the generators that everybody shares
        model: Any = LlamaForCausalLM(config)
    model = model.to_empty(device=device).to(precision).eval().requires_grad_(False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    own = torch.Generator(device).manual_seed(0)
    for weight in model.parameters():
        weight.normal_(std=0.2, generator=own)
    return cast("PreTrainedModel", model)


def _key(
    known: Facts, tokens: int, recipe: Recipe, dtype: torch.dtype, precision: torch.dtype, device: torch.device
) -> str:
    """What decides which kernels are compiled, as 32 hexadecimal digits."""
    import triton

    parts = [
        __version__,
        torch.__version__,
        triton.__version__,
        torch.cuda.get_device_name(device),
        (known.heads, known.kv_heads, known.head_dim),
        (min(tokens, _LONGEST), tokens % 16 == 0),
        recipe.to_dict(),
        (dtype, precision),
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def _done(seal: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written: it is rehearsed again next time
        seal.parent.mkdir(parents=True, exist_ok=True)
        seal.touch()
