"""A model is exact or refused: what the workbench computes is compared with the model's own forward before it is used.

The workbench puts its own attention in the place of the model's, so whatever a model does beside it (state next to keys
and values, masks and positions of its own, two attentions in a layer) would be lost without a word. A few random tokens
tell: they are read and decoded as every prompt is, and the logits are held against those of the model by itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from workbench.engine.attention_hook import device_of, exclusive, remembering
from workbench.engine.images import image_token, unchanged
from workbench.errors import NotApplicable
from workbench.kv.methods.full import Full
from workbench.models import Facts, cache_dir
from workbench.models.decoder import decoder_layers
from workbench.models.quiet import quiet
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.runtime.continuing import fresh_states
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan
from workbench.runtime.prefill import read
from workbench.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from workbench.trace import Trace

_READ = 12  # tokens that are read at once; those that follow are decoded
_STEPS = (4, 1)  # so many at a time: several, then one
_WINDOW = 8  # what sliding windows are narrowed to meanwhile, so that reading and decoding pass their edge
_CHUNK = 7  # the same of chunks: edges lie within what is read at once and within several decoded tokens
_CHOSEN = 4  # so many positions an indexer chooses meanwhile, so that it leaves some out
_CLOSE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}  # of a row of logits' spread, by precision
_RULES = 3  # raise it when what is checked changes: models are then looked at again


def verify(model: PreTrainedModel, facts: Facts, progress: Progress | None = None) -> None:
    """Raise NotApplicable where reading or decoding differs from the model by itself, naming the first layer.

    Compared are the logits after 12 tokens read at once, then four together and one more decoded, on uncompressed
    stores here and on the model's own cache there, with sliding windows narrowed to 8 tokens, chunks to 7 and what
    indexers choose to 4 meanwhile. A model that passes is remembered in the cache folder by its config, its modules,
    its precision and the versions of the libraries. Raises Cancelled between layers.
    """
    seal = cache_dir() / "exact" / fingerprint(model)
    if seal.exists():
        return
    ids = _ids(model, facts, min(_READ + sum(_STEPS), facts.max_positions))
    # Nobody else may use the model meanwhile: its windows are narrow.
    with exclusive(model), _narrowed(model):
        got = _logits(model, facts, ids, progress or Progress())  # first: it says best why a model cannot be read
        reference = _own_logits(model, ids)
        if not reference.isfinite().all():
            raise NotApplicable(
                f"{facts.name}: its own logits are not finite numbers: its weights are damaged, or what it computes is "
                f"too large for {str(model.dtype).removeprefix('torch.')}"
            )
        wrong = _wrong(reference, got, _precision(model))
        if wrong is not None:
            layer = _first_layer(model, facts, ids)
            where = "" if layer is None else f", first in layer {layer}"
            raise NotApplicable(
                f"{facts.name} ({type(model).__name__}): {wrong} gives other logits than the model itself{where}; it "
                "keeps state, positions or masks of its own that are not reproduced here, and no figure would be true. "
                "Session(..., trust=True) goes on all the same"
            )
    _remember(seal)


def _remember(seal: Path) -> None:
    with suppress(OSError):  # a cache that cannot be written: the model is looked at again next time
        seal.parent.mkdir(parents=True, exist_ok=True)
        seal.touch()


def verify_images(model: PreTrainedModel, facts: Facts, trace: Trace) -> None:
    """Raise NotApplicable where what was read of a prompt with images differs from the model's own `generate`.

    Compared are the logits after the prompt and after one token more. A model that passes is remembered as `verify`
    remembers it.
    """
    images, seal = trace.prompt.images, cache_dir() / "exact" / f"{fingerprint(model)}-images"
    if images is None or seal.exists():
        return
    device = device_of(model)
    with exclusive(model), unchanged(model), torch.inference_mode(), quiet():
        generating: Any = model
        own = generating.generate(
            input_ids=trace.ids.to(device)[None],
            attention_mask=torch.ones_like(trace.ids, device=device)[None],
            **{name: tensor.to(device) for name, tensor in images.inputs.items()},
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            num_beams=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
    plan = make_plan(trace, [Full()], _precision(model), model=model)
    decoder = Decoder(model, plan.stores(), plan.position, memory=trace.memory, states=plan.states)
    decoder.images = images
    got = torch.cat([trace.logits[None].to(device), decoder.feed(own.sequences[0, trace.tokens : trace.tokens + 1])])
    wrong = _wrong(torch.cat(own.logits).float(), got, _precision(model))
    if wrong is not None:
        raise NotApplicable(
            f"{facts.name} ({type(model).__name__}): {wrong} a prompt with images gives other logits than the model "
            "itself, so no figure would be true; Session(..., trust=True) goes on all the same"
        )
    _remember(seal)


def fingerprint(model: PreTrainedModel) -> str:
    """What decides how a model computes, but for the numbers in its weights, as 32 hexadecimal digits."""
    import transformers

    config = model.config.to_dict()
    names = sorted(set(config) - {"_name_or_path", "transformers_version"})
    kind = type(model)
    parts = [
        _RULES,
        __version__,
        transformers.__version__,
        torch.__version__,
        f"{kind.__module__}.{kind.__qualname__}",
        device_of(model).type,
        model.config._attn_implementation,  # noqa: SLF001  (Falcon's ALiBi is another one with "eager")
        _precision(model),
        *((name, config[name]) for name in names),
        model,  # its modules and their sizes
    ]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:32]


def probed(model: PreTrainedModel, facts: Facts, progress: Progress | None = None) -> Trace:
    """What reading 12 random tokens records of a model. Raises NotApplicable, Cancelled."""
    ids = _ids(model, facts, min(_READ, facts.max_positions))
    return read(model, facts, Prompt(ids, chat=False), progress=progress)


def _precision(model: PreTrainedModel) -> torch.dtype:
    return cast("Tensor", model.get_input_embeddings().weight).dtype


def _ids(model: PreTrainedModel, facts: Facts, tokens: int) -> Tensor:
    """Random tokens [n], the same each time; none of those that the config gives a meaning (padding, images)."""
    configs: list[Any] = [model.config, model.config.get_text_config()]
    named = {
        value
        for config in configs
        for name, value in vars(config).items()
        if "token" in name and isinstance(value, int)
    }
    drawn = torch.randint(0, facts.vocab_size, (8 * tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor([token for token in drawn if token not in named][:tokens] or drawn[:tokens])


def _parts(ids: Tensor) -> list[Tensor]:
    """How ids [n] are taken in, here and there alike: most at once, then by steps, as far as they go."""
    first = min(_READ, max(ids.numel() - sum(_STEPS), 1))
    parts, rest = [ids[:first]], ids[first:]
    for step in _STEPS:
        parts.append(rest[:step])
        rest = rest[step:]
    return [part for part in parts if part.numel()]


def _own_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [r, v] as the model itself computes them, with its own cache: after the last token that is read at once
    and all that are decoded. Where layers keep states, or images seen before may have moved positions, these are said,
    as `generate` does; tokens whose states would be lost among several are given one after another. A model without a
    cache reads everything each time.
    """
    rows: list[Tensor] = []
    cache, states, end = None, fresh_states(model), 0
    first, *rest = _parts(ids)
    parts = [first, *(torch.cat(rest).split(1) if rest and states is not None and states.singly else rest)]
    with torch.inference_mode(), quiet(), remembering():
        for part in parts:
            at, end = 0 if cache is None else end, end + part.numel()
            inputs = ids[at:end].to(device_of(model))[None]
            count = part.numel() if rows else 1
            where = torch.arange(at, end, device=inputs.device)[None]
            said = {"position_ids": where} if states is not None or image_token(model) is not None else {}
            output: Any = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=count, **said)
            cache = getattr(output, "past_key_values", None)
            rows.append(output.logits[0, -count:].float())
    return torch.cat(rows)


def _logits(model: PreTrainedModel, facts: Facts, ids: Tensor, progress: Progress) -> Tensor:
    """The same as the workbench computes them."""
    first, *parts = _parts(ids)
    trace = read(model, facts, Prompt(first, chat=False), progress=progress)
    plan = make_plan(trace, [Full()], _precision(model), model=model)
    decoder = Decoder(model, plan.stores(), plan.position, progress=progress, memory=trace.memory, states=plan.states)
    rows = [decoder.feed(part, logits=part.numel()) for part in parts]
    return torch.cat([trace.logits[None].to(device_of(model)), *rows])


def _wrong(reference: Tensor, got: Tensor, precision: torch.dtype) -> str | None:
    """What differs between logits [r, v], the first row after reading and the others after decoding; None: nothing.

    In 16 bits single rows may differ by much (an expert of a mixture chosen the other way), so most have to agree.
    """
    off = (reference - got).norm(dim=1) / (reference - reference.mean(dim=1, keepdim=True)).norm(dim=1).clamp_min(1e-12)
    limit = _CLOSE.get(precision, 1e-3)
    if not bool(off[0] <= limit):
        return "reading"
    decoded = off[1:].max() if precision == torch.float32 else off[1:].median()
    return None if bool(decoded <= limit) else "decoding"


def _first_layer(model: PreTrainedModel, facts: Facts, ids: Tensor) -> int | None:
    """The first decoder layer whose outputs differ between both ways; None where its layers cannot be told."""
    try:
        layers = list(decoder_layers(model).values())
    except NotApplicable:  # an architecture whose layers are not in one list: the refusal names none
        return None
    with _outputs(layers) as reference:
        _own_logits(model, ids)
    with _outputs(layers) as got:
        _logits(model, facts, ids, Progress())
    limit = _CLOSE.get(_precision(model), 1e-3)
    for layer, (one, other) in enumerate(zip(reference, got, strict=True)):
        a, b = (torch.cat(parts)[-sum(_STEPS) - 1 :].float() if parts else torch.empty(0, 1) for parts in (one, other))
        if a.shape != b.shape or not bool((a - b).norm() <= limit * a.norm()):
            return layer
    return None


@contextmanager
def _outputs(layers: Sequence[nn.Module]) -> Iterator[list[list[Tensor]]]:
    """What each layer gives while the block lasts, [t, hidden] for each call."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def listening(index: int) -> Any:
        def hook(_module: nn.Module, _given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen[index].append(hidden.reshape(-1, hidden.shape[-1]))

        return hook

    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            undo.callback(layer.register_forward_hook(listening(index)).remove)
        yield seen


@contextmanager
def _narrowed(model: PreTrainedModel) -> Iterator[None]:
    """Until the block ends sliding windows are 8 tokens wide and chunks 7, where their masks go by the config, and
    indexers choose 4 positions.
    """
    config = model.config.get_text_config()
    wide: list[tuple[Any, str, int]] = [(config, "sliding_window", _WINDOW), (config, "attention_chunk_size", _CHUNK)]
    wide += [(module, "index_topk", _CHOSEN) for module in model.modules()]
    with ExitStack() as undo:
        for place, name, narrow in wide:
            width = getattr(place, name, None)
            if isinstance(width, int) and width > narrow:
                setattr(place, name, narrow)
                undo.callback(setattr, place, name, width)
        yield
