"""Which layer hurts: what compressing one part of a model alone does to what it says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import pandas as pd
from torch import Tensor, nn

from workbench import arguments
from workbench.core.relative_error import relative_error
from workbench.engine.attention_hook import exclusive
from workbench.errors import NotApplicable
from workbench.models.decoder import decoder_layers, placed
from workbench.progress import Progress
from workbench.registry import Method
from workbench.weights.calibration.block_runner import BlockRunner
from workbench.weights.calibration.model_head import ModelHead
from workbench.weights.compress import weight_methods
from workbench.weights.surgery.replaced import replaced
from workbench.weights.surgery.sharing_copy import sharing_copy
from workbench.weights.variants import Variants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Each = Literal["layer", "module"]
ALL = "all"


def sensitivity(
    variants: Variants,
    methods: Sequence[Method],
    *,
    each: Each = "layer",
    texts: int = 4,
    tokens: int = 256,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """What weight methods do to the model's predictions in one part of the model alone; see `sensitivity_of`.

    texts, tokens: how much of the calibration texts is read, the beginning of each. Raises BadRecipe for methods of
    another family, BadParameter, and NotApplicable for methods whose layers only make sense together.
    """
    chosen = weight_methods(methods)
    for method in chosen:
        if why := method.together:
            raise NotApplicable(f"{method.key}: no part of what it does stands alone: {why}")
    arguments.choice("each", each, get_args(Each))
    ids = variants.ids(texts, tokens)
    return sensitivity_of(variants.model, variants.get(chosen, progress), ids, each, progress)


def sensitivity_of(
    model: PreTrainedModel, twin: PreTrainedModel, ids: Tensor, each: Each = "layer", progress: Progress | None = None
) -> pd.DataFrame:
    """What each part of a compressed copy `twin` does by itself, all the rest being the model's own.

    ids: int64 [t, n], the texts. each: "layer": each decoder layer with all that was compressed in it (the module is
    then "all"), and each kind of module in all layers at once (the layer is then missing); "module": each module of
    each layer. What was compressed outside the layers, an embedding or the output head, is one part.

    Columns: layer, module, kl (divergence of the next token's distribution from the model's, in nats, averaged over the
    tokens), error (of the hidden states that leave the layer, or the last one, relative to their norm). The hidden
    states that enter a layer are reused, so that only what comes after it runs again.
    Raises NotApplicable where the copy has other layers than the model.
    """
    progress = progress or Progress()
    names = list(decoder_layers(model))
    if list(decoder_layers(twin)) != names:
        raise NotApplicable("layers are compared one by one, but the compressed model has other layers than the model")
    changed = replaced(model, twin)
    inside = {name: [path for path in changed if path.startswith(f"{name}.")] for name in names}
    kinds = list(dict.fromkeys(placed(path, names)[1] for paths in inside.values() for path in paths))
    outside = [path for path in changed if placed(path, names)[0] is None]
    rows: list[dict[str, object]] = []
    with exclusive(model), exclusive(twin):
        runner = BlockRunner(model, ids)
        begin = runner.hidden
        head = ModelHead(model)
        want = begin
        for name in names:
            progress.check()
            want = runner.forward(name, want)

        def row(layer: int | None, module: str, hidden: Tensor, error: float, other: ModelHead | None = None) -> None:
            kl = head.divergence(want, hidden, other)
            rows.append({"layer": layer, "module": module, "kl": kl, "error": error})

        for index, name in enumerate(progress.track(names, "measuring layers", len(names))):
            entering = runner.hidden
            for _ in runner.run(name):
                progress.check()
            left = runner.hidden
            for module, block in _parts(model, twin, name, inside[name], each):
                hidden = runner.forward(name, entering, block)
                error = relative_error(hidden, left)
                for later in names[index + 1 :]:
                    progress.check()
                    hidden = runner.forward(later, hidden)
                row(index, module, hidden, error)
        for kind in progress.track(kinds if each == "layer" else (), "measuring modules", len(kinds)):
            hidden = begin
            for name in names:
                progress.check()
                block = _switched(model.get_submodule(name), twin.get_submodule(name), [kind])
                hidden = runner.forward(name, hidden, block)
            row(None, kind, hidden, relative_error(hidden, want))
        if outside:
            other = sharing_copy(twin)
            for name in names:
                other.set_submodule(name, model.get_submodule(name))
            entering = BlockRunner(other, ids).hidden
            for name in names:
                progress.check()
                entering = runner.forward(name, entering)
            row(None, ", ".join(outside), entering, relative_error(entering, want), ModelHead(other))
    return pd.DataFrame(rows, columns=["layer", "module", "kl", "error"]).astype({"layer": "Int64"})


def _parts(
    model: PreTrainedModel, twin: PreTrainedModel, name: str, paths: list[str], each: Each
) -> Iterator[tuple[str, nn.Module]]:
    """What to run in the place of a block: (which part of it is compressed, the block)."""
    small = twin.get_submodule(name)
    if each == "layer":
        yield ALL, small
        return
    for path in paths:
        short = path.removeprefix(f"{name}.")
        yield short, _switched(model.get_submodule(name), small, [short])


def _switched(block: nn.Module, small: nn.Module, paths: list[str]) -> nn.Module:
    """A copy of a block that shares its tensors, with some modules from `small` where that has others."""
    shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
    made = copy.deepcopy(block, dict(shared))
    for path in paths:
        try:
            made.set_submodule(path, small.get_submodule(path), strict=True)
        except AttributeError:
            continue  # not every layer has a module of this kind
    return made
