"""The rotation of a layer: found in the model, and held against what its layers really do with positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from workbench.errors import NoRotation, NotApplicable
from workbench.models.facts import max_positions

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from workbench.core.rope import Rotation
    from workbench_kernels import Scoring

_SHOWN = 32  # positions at which layers show what they do, where the model has so many before its tables switch


class Rotations:
    """How a model's layers turn queries and keys: found by a pass of 32 tokens or fewer when first asked for, and
    remembered here, with whoever keeps it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def of(self, layer: int, read: int = 0, width: int | None = None) -> Rotation:
        """The rotation of `layer`; nothing (a width of 0) where it attends without positions.

        read: tokens that were read at once, which choose among tables that switch with length; each later position, for
        itself, is at the end of what has been read. width: channels of the heads that are to be turned, where they may
        be fewer than the model's own. Raises NoRotation where positions enter the model in another way, such as learned
        ones that are added to embeddings, and NotApplicable where the layer rotates by no convention that is known, or
        its heads have lost channels that are turned.
        """
        from workbench.core.rope import Rotation
        from workbench.engine.attention_hook import exclusive

        with exclusive(self._model):  # whoever waits for a pass of the model then finds them here
            outcome = self._outcomes[layer]
        if isinstance(outcome, str):
            raise NotApplicable(outcome)
        if outcome is None:
            raise _without(type(self._model).__name__)
        if width is not None and outcome.width > width:
            raise NotApplicable(
                f"layer {layer} of {type(self._model).__name__} has lost {outcome.width - width} of {outcome.width} "
                "channels that rotate, each head others; methods that rotate keys cannot be applied to it"
            )
        if not isinstance(outcome.table, _Switching):
            return outcome
        return Rotation(partial(outcome.table, read=read), outcome.order)

    @cached_property
    def _outcomes(self) -> tuple[Rotation | str | None, ...]:
        """By layer: its rotation, None, or why none can be said."""
        return _find(self._model)


def rotation_of(model: PreTrainedModel, layer: int, read: int = 0) -> Rotation:
    """How `layer` turns queries and keys, looked for anew; see `Rotations.of`."""
    return Rotations(model).of(layer, read)


def rotary(model: PreTrainedModel, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [n, rotary_dim] float32, that `layer` applies to queries and keys at `positions` [n].

    rotary_dim is the head size, or less where only part of each head is rotated; channels are in the order of halves
    (see `Rotation`). Attention scaling (YaRN, LongRoPE) is included, as the model itself applies it. Scalings that
    switch with length choose for each position as where one token is read after the other. Raises NoRotation for a
    model or layer that does not rotate, and what `Rotations.of` raises.
    """
    rotation = rotation_of(model, layer)
    if not rotation.width:
        raise _without(f"layer {layer} of {type(model).__name__}")
    return rotation(positions)


def switch(model: PreTrainedModel) -> int | None:
    """The length in tokens beyond which a model rotates by another table (LongRoPE, dynamic NTK); None: never."""
    config: Any = model.config.get_text_config()
    kinds = _by_kind(config)
    return min((length for kind in kinds if (length := _switch(config, kind)) is not None), default=None)


def switch_notes(model: PreTrainedModel, read: int, end: int) -> tuple[str, ...]:
    """What is to be said where `read` tokens were read at once, and others one by one or in pieces up to `end`."""
    until = switch(model)
    if until is None or not read <= until < end:
        return ()
    note = (
        f"{type(model).__name__} rotates by another table beyond {until} tokens: what was read before keeps the first "
        "one, where the model's own generation may read it again by the other"
    )
    return (note,)


def _without(where: str) -> NoRotation:
    return NoRotation(f"{where} uses no rotary positions; methods that rotate keys cannot be applied to it")


# --- Tables


def _embeddings(model: nn.Module) -> list[Any]:
    """The modules of a text model that make rotary tables, those of the decoder itself first."""
    source: Any = model
    decoder = source.get_decoder()
    for root in (decoder, model):  # what some models call their decoder is a part of it, or the head
        modules: list[Any] = [
            module
            for module in root.modules()
            if any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False))
            and "position_ids" in signature(module.forward).parameters
        ]
        if modules:
            return sorted(modules, key=lambda module: module is not getattr(decoder, "rotary_emb", None))
    return [_Sinusoids(buffer) for name, buffer in model.named_buffers() if name.endswith(".embed_positions")][:1]


class _Sinusoids:
    """A table that layers hold as a buffer [positions, r], sines before cosines (GPT-J), asked as a module is asked.

    Beyond its end, where the model reads nothing, it turns on.
    """

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def buffers(self) -> Iterator[Tensor]:
        yield self._buffer

    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        sin, cos = self._buffer.float().chunk(2, dim=-1)
        turns = torch.complex(cos, sin)
        again = position_ids.to(turns.device) // len(turns)
        turned = turns[position_ids % len(turns)] * (turns[-1] * turns[1]) ** again[..., None]
        return turned.real.to(like.dtype), turned.imag.to(like.dtype)

    __call__ = forward


def _types(embedding: Any, config: Any) -> list[str | None]:
    """The kinds of layer for which it keeps tables of their own; one None where it has one for all."""
    if "layer_type" not in signature(embedding.forward).parameters:
        return [None]
    kinds = getattr(embedding, "rope_type", None)
    names = list(kinds) if isinstance(kinds, dict) else list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    return [kind for kind in names if hasattr(embedding, f"{kind}_inv_freq")] or [None]


def _by_kind(config: Any) -> dict[str | None, dict[str, Any]]:
    """The rotary parameters of each kind of layer, under None where all have the same."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = {kind: rope for kind, rope in given.items() if isinstance(rope, dict)}
    return kinds or {None: given}


def _switch(config: Any, kind: str | None) -> int | None:
    """The length beyond which a kind of layer has another table."""
    rope = _by_kind(config).get(kind, {})
    named = str(rope.get("rope_type", ""))
    if "dynamic" in named:
        return int(config.max_position_embeddings)
    return int(rope["original_max_position_embeddings"]) if named == "longrope" else None


@dataclass(frozen=True)
class _Table:
    """The table of one kind of layer: positions [p] -> (cos, sin) [p, r] float32, in the order of halves.

    lies: "halves" or "pairs", how the module's own columns repeat the angles; "once": they do not. backwards: the model
    turns the other way.
    """

    embedding: Any
    kind: str | None
    lies: str = "halves"
    backwards: bool = False

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.of(self.embedding, positions)

    def of(self, embedding: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The table as this embedding, or a copy of it, makes it now."""
        import torch

        cos, sin = _columns(embedding, self.kind, positions)
        if self.lies != "halves":
            step = 2 if self.lies == "pairs" else 1
            cos, sin = (torch.cat([x[:, ::step], x[:, ::step]], dim=1) for x in (cos, sin))
        return cos, -sin if self.backwards else sin


@dataclass(frozen=True)
class _Switching(_Table):
    """A table that depends on the length of what has been read; the model's own state is left alone."""

    until: int = 0
    again: bool = False  # with every length beyond, as dynamic NTK does, and not once

    def __call__(self, positions: Tensor, read: int = 0) -> tuple[Tensor, Tensor]:
        """As where the first `read` tokens were read at once, and all others one after the other."""
        import torch

        fresh = _copy(self.embedding)
        lengths = (positions + 1).clamp(min=max(read, self.until), max=None if self.again else self.until + 1)
        cos, sin = self.of(fresh, positions.new_zeros(1))  # which also brings it back to its first table
        cos, sin = (x.new_empty(len(positions), x.shape[1]) for x in (cos, sin))
        for length in lengths.unique().tolist():
            part = (lengths == length).nonzero()[:, 0]
            table = self.of(fresh, torch.cat([positions[part], positions.new_tensor([length - 1])]))
            for whole, some in zip((cos, sin), table, strict=True):
                whole[part.to(whole.device)] = some[:-1]
        return cos, sin


def _copy(embedding: Any) -> Any:
    """A copy that may change its state; the config, which never does, is shared."""
    config = getattr(embedding, "config", None)
    return deepcopy(embedding, {id(config): config})


def _columns(embedding: Any, kind: str | None, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [p, columns] float32, as the module itself makes them."""
    import torch

    device = next(embedding.buffers()).device
    ids = positions.to(device=device, dtype=torch.long)[None]  # [1, p]
    if getattr(embedding, "mrope_section", None) is not None:
        ids = ids.expand(3, 1, -1)  # text moves alike in time, height and width
    like = torch.empty((), dtype=torch.float32, device=device)  # only its dtype and device are read
    with torch.no_grad():
        made = embedding(like, ids) if kind is None else embedding(like, ids, layer_type=kind)
    cos, sin = (made.real, made.imag) if isinstance(made, torch.Tensor) else made
    first = (0,) * (cos.ndim - 2)  # of the batch, and of the three axes of M-RoPE, which are alike
    return cos[first].float(), sin[first].float()


# --- What a layer does with positions


class _Show:
    """Lets each token attend to itself alone, so that equal tokens stay equal at every layer, and keeps what it saw."""

    def __init__(self) -> None:
        self._seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.sloped: set[int] = set()  # layers whose scores tell positions, and not their keys

    @property
    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys [k, n, d] and queries [h, n, d] of all passes, by layer."""
        import torch

        return {
            layer: (torch.cat([key for key, _ in seen], dim=1), torch.cat([query for _, query in seen], dim=1))
            for layer, seen in self._seen.items()
        }

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        self._seen.setdefault(layer, []).append((key, query))
        if scoring.slopes is not None:
            self.sloped.add(layer)
        return value.repeat_interleave(query.shape[0] // value.shape[0], dim=0)


def _find(model: PreTrainedModel) -> tuple[Rotation | str | None, ...]:
    """The rotation of each layer: one token is shown at many positions, where it differs by its rotation alone.

    Where layers keep a state of what was read the token is shown in as many passes, each from a fresh state.
    """
    import torch

    from workbench.engine.attention_hook import forward
    from workbench.engine.states import attending, keeps_states, states_of

    config: Any = model.config.get_text_config()
    token = config.vocab_size // 2
    token += token == getattr(config, "pad_token_id", None)
    count = min(limit for limit in (_SHOWN, max_positions(model), switch(model)) if limit)
    show = _Show()
    ids, positions = torch.full((count,), token), torch.arange(count)
    at_once = 1 if keeps_states(model) else count
    for part, at in zip(ids.split(at_once), positions.split(at_once), strict=True):
        forward(model, show, part, at, cache=states_of(model))
    name, tables, shown = type(model).__name__, _tables(model), show.layers
    outcomes: list[Rotation | str | None] = []
    known: list[Rotation] = []
    places = {layer: place for place, layer in enumerate(attending(model))}
    for layer in range(config.num_hidden_layers):
        if (seen := shown.get(places.get(layer, -1))) is None:
            outcomes.append(f"layer {layer} of {name} does not use transformers' attention interface")
            continue
        outcome = None if places[layer] in show.sloped else _judged(*seen, known, tables)
        if isinstance(outcome, str):
            outcome = f"layer {layer} of {name} {outcome}; methods that rotate keys cannot be applied to it"
        elif outcome is not None and outcome not in known:
            known.append(outcome)
        outcomes.append(outcome)
    return tuple(outcomes)


def _judged(
    keys: Tensor, queries: Tensor, known: Sequence[Rotation], tables: Sequence[_Table]
) -> Rotation | str | None:
    """The rotation that makes keys [k, n, d] and queries [h, n, d] of one token alike at all positions 0 to n - 1."""
    import torch

    keys, eps = keys.float(), torch.finfo(keys.dtype).eps
    lengths = queries.float().norm(dim=-1, keepdim=True)
    # A temperature by position, as in Llama 4, is not part of the rotation.
    queries = queries.float() * torch.where(lengths > 0, lengths[:, :1] / lengths, 1.0)
    if keys.shape[-1] != queries.shape[-1]:
        return "has queries and keys of different sizes"
    shown, allowed = torch.cat([keys, queries]), max(1e-3, 4 * eps)
    for candidate in _candidates(keys.shape[-1], known, tables):
        if _unevenness(shown, candidate) < allowed:
            return candidate
    return "rotates its keys in a way that is not known" if tables else None


def _unevenness(shown: Tensor, candidate: Rotation) -> float:
    """How much vectors [c, n, d] differ between positions once they are turned back: 0 not at all, 1 entirely.

    Every pair of channels counts alike, so that a few large channels, which real models have, do not hide the others.
    """
    import torch

    at = torch.arange(shown.shape[1], device=shown.device)
    x = candidate.halved(candidate.undo(shown, at))
    mean = x.mean(dim=1, keepdim=True)
    off, size = (x - mean).square().mean(dim=1), shown.square().mean(dim=1)  # [c, d]
    size = candidate.halved(size)
    floor = 1e-4 * size.mean(dim=-1, keepdim=True)
    half = candidate.width // 2

    def paired(y: Tensor) -> Tensor:
        return torch.cat([y[:, :half] + y[:, half : 2 * half], y[:, 2 * half :]], dim=-1)

    share = paired(off) / (paired(size) + floor).clamp_min(torch.finfo(torch.float32).tiny)
    return float(share.mean().sqrt())


def _candidates(width: int, known: Sequence[Rotation], tables: Sequence[_Table]) -> Iterator[Rotation]:
    """Rotations of heads of `width` channels that a layer may have: those of other layers, none, all conventions."""
    import torch

    from workbench.core.rope import Rotation

    yield from (r for r in known if r.width <= width and (r.order is None or len(r.order) == width))
    if all(rotation.width for rotation in known):
        yield Rotation(_nothing)
    for table in tables:
        turned = table(torch.zeros(1, dtype=torch.long))[0].shape[1]
        if turned <= width:
            yield from (Rotation(table, order) for order in _orders(width, turned))


def _nothing(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The table [p, 0] of a layer that does not rotate."""
    import torch

    empty = torch.empty(len(positions), 0, device=positions.device)
    return empty, empty


def _orders(width: int, turned: int) -> Iterator[tuple[int, ...] | None]:
    """Channels in the order of halves, where the first or the last `turned` of them are turned, in halves or pairs."""
    for first in dict.fromkeys((0, width - turned)):
        rotated = range(first, first + turned)
        rest = (*range(first), *range(first + turned, width))
        for order in ((*rotated, *rest), (*rotated[::2], *rotated[1::2], *rest)):
            yield None if order == tuple(range(width)) else order


def _tables(model: PreTrainedModel) -> list[_Table]:
    """The tables that a model makes, for turning forwards and, less usual, backwards."""
    import torch

    config: Any = model.config.get_text_config()
    tables: list[_Table] = []
    for embedding in _embeddings(model):
        for kind in _types(embedding, config):
            cos, sin = _columns(_copy(embedding), kind, torch.arange(_SHOWN))
            half, lies = cos.shape[1] // 2, "once"
            if cos.shape[1] == 2 * half:
                if torch.equal(cos[:, :half], cos[:, half:]) and torch.equal(sin[:, :half], sin[:, half:]):
                    lies = "halves"
                elif torch.equal(cos[:, ::2], cos[:, 1::2]) and torch.equal(sin[:, ::2], sin[:, 1::2]):
                    lies = "pairs"
            until = _switch(config, kind)
            if until is None:
                tables.append(_Table(embedding, kind, lies))
            else:
                again = "dynamic" in _by_kind(config)[kind]["rope_type"]
                tables.append(_Switching(embedding, kind, lies, until=until, again=again))
    return [*tables, *(replace(table, backwards=True) for table in tables)]
