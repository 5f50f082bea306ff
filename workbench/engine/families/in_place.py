"""Who stands in for which class of module, and putting them there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from workbench.engine.families import bart, bloom, falcon, gpt_neo, gpt_neox_japanese, gptj, mpt, openai_gpt
from workbench.engine.families.adapter import Adapter, Attend, Positions
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODELS = "transformers.models"
# By the file of a model in transformers: its classes, and what takes the place of a part of their instances.
ADAPTERS: Mapping[str, Mapping[str, Adapter]] = {
    f"{_MODELS}.{file}": classes
    for file, classes in {
        "bart.modeling_bart": {"BartLearnedPositionalEmbedding": bart.POSITIONS},
        "bigbird_pegasus.modeling_bigbird_pegasus": {"BigBirdPegasusLearnedPositionalEmbedding": bart.POSITIONS},
        "blenderbot.modeling_blenderbot": {"BlenderbotLearnedPositionalEmbedding": bart.POSITIONS},
        "blenderbot_small.modeling_blenderbot_small": {"BlenderbotSmallLearnedPositionalEmbedding": bart.POSITIONS},
        "bloom.modeling_bloom": {"BloomAttention": bloom.ATTENTION, "BloomModel": bloom.DECODER},
        "codegen.modeling_codegen": {"CodeGenAttention": gptj.ATTENTION},
        "falcon.modeling_falcon": {"FalconAttention": falcon.ATTENTION, "FalconModel": falcon.DECODER},
        "gpt_neo.modeling_gpt_neo": {"GPTNeoSelfAttention": gpt_neo.ATTENTION},
        "gpt_neox_japanese.modeling_gpt_neox_japanese": {"GPTNeoXJapaneseAttention": gpt_neox_japanese.ATTENTION},
        "gptj.modeling_gptj": {"GPTJAttention": gptj.ATTENTION},
        "marian.modeling_marian": {"MarianSinusoidalPositionalEmbedding": bart.POSITIONS},
        "mbart.modeling_mbart": {"MBartLearnedPositionalEmbedding": bart.POSITIONS},
        "mpt.modeling_mpt": {"MptAttention": mpt.ATTENTION},
        "mvp.modeling_mvp": {"MvpAttention": bart.ATTENTION, "MvpLearnedPositionalEmbedding": bart.POSITIONS},
        "openai.modeling_openai": {"Attention": openai_gpt.ATTENTION},
        "pegasus.modeling_pegasus": {"PegasusSinusoidalPositionalEmbedding": bart.POSITIONS},
        "plbart.modeling_plbart": {"PLBartLearnedPositionalEmbedding": bart.POSITIONS},
        "trocr.modeling_trocr": {"TrOCRAttention": bart.ATTENTION, "TrOCRLearnedPositionalEmbedding": bart.POSITIONS},
        "xglm.modeling_xglm": {"XGLMAttention": bart.ATTENTION},
    }.items()
}


@contextmanager
def adapted(model: PreTrainedModel, attend: Attend, positions: Positions) -> Iterator[bool]:
    """Until the block ends a model of a family that needs it attends by `attend`, or takes its tokens to stand at
    `positions`; whether it does not use transformers' attention interface by itself.

    Layers that do not say which they are (layer_idx) are counted. Raises NotApplicable where the modules of a family
    have not the parts that are read of them.
    """
    file = type(model).__module__
    interface = hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS")  # imported where a model uses it
    known = {kind: adapter for kind, adapter in ADAPTERS.get(file, {}).items() if adapter.positions or not interface}
    with ExitStack() as undo:
        counts = dict.fromkeys(known, 0)
        for module in model.modules() if known else ():
            kind = type(module).__name__
            if type(module).__module__ == file and kind in known:
                _put(module, known[kind], partial(attend, layer_idx=counts[kind]), positions, undo)
                counts[kind] += 1
        yield bool(known) and not interface


def _put(module: nn.Module, adapter: Adapter, attend: Attend, positions: Positions, undo: ExitStack) -> None:
    """Let an adapter take its place on a module until `undo` is closed."""
    changed = next(adapter.changed(module), None)
    if changed is not None:
        kind = type(module).__name__
        raise NotApplicable(f"{kind} of this version of transformers has {changed}: how it attends is not known here")
    if adapter.name in vars(module):
        undo.callback(setattr, module, adapter.name, vars(module)[adapter.name])
    else:
        undo.callback(delattr, module, adapter.name)
    setattr(module, adapter.name, adapter.made(module, attend, positions))
