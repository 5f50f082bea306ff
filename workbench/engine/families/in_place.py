"""Who stands in for which class of module, and putting them there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from workbench.engine.families import bloom, falcon, gpt_neo, gpt_neox_japanese, gptj, mpt, openai_gpt, xglm
from workbench.engine.families.adapter import Adapter, Attend
from workbench.errors import NotApplicable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODELS = "transformers.models"
# By the file of a model in transformers: its classes, and what takes the place of a part of their instances.
ADAPTERS: Mapping[str, Mapping[str, Adapter]] = {
    f"{_MODELS}.bloom.modeling_bloom": {"BloomAttention": bloom.ATTENTION, "BloomModel": bloom.DECODER},
    f"{_MODELS}.codegen.modeling_codegen": {"CodeGenAttention": gptj.ATTENTION},
    f"{_MODELS}.falcon.modeling_falcon": {"FalconAttention": falcon.ATTENTION, "FalconModel": falcon.DECODER},
    f"{_MODELS}.gpt_neo.modeling_gpt_neo": {"GPTNeoSelfAttention": gpt_neo.ATTENTION},
    f"{_MODELS}.gpt_neox_japanese.modeling_gpt_neox_japanese": {
        "GPTNeoXJapaneseAttention": gpt_neox_japanese.ATTENTION
    },
    f"{_MODELS}.gptj.modeling_gptj": {"GPTJAttention": gptj.ATTENTION},
    f"{_MODELS}.mpt.modeling_mpt": {"MptAttention": mpt.ATTENTION},
    f"{_MODELS}.openai.modeling_openai": {"Attention": openai_gpt.ATTENTION},
    f"{_MODELS}.xglm.modeling_xglm": {"XGLMAttention": xglm.ATTENTION},
}


@contextmanager
def adapted(model: PreTrainedModel, attend: Attend) -> Iterator[bool]:
    """Until the block ends a model of a family that needs it attends by `attend`; whether it is one.

    Layers that do not say which they are (layer_idx) are counted. Raises NotApplicable where the modules of a family
    have not the parts that are read of them.
    """
    file = type(model).__module__
    known = ADAPTERS.get(file, {})
    if not known or hasattr(sys.modules[file], "ALL_ATTENTION_FUNCTIONS"):  # it uses the interface by now
        yield False
        return
    with ExitStack() as undo:
        counts = dict.fromkeys(known, 0)
        for module in model.modules():
            kind = type(module).__name__
            if type(module).__module__ == file and kind in known:
                _put(module, known[kind], partial(attend, layer_idx=counts[kind]), undo)
                counts[kind] += 1
        yield True


def _put(module: nn.Module, adapter: Adapter, attend: Attend, undo: ExitStack) -> None:
    """Let an adapter take its place on a module until `undo` is closed."""
    changed = next(adapter.changed(module), None)
    if changed is not None:
        kind = type(module).__name__
        raise NotApplicable(f"{kind} of this version of transformers has {changed}: how it attends is not known here")
    if adapter.name in vars(module):
        undo.callback(setattr, module, adapter.name, vars(module)[adapter.name])
    else:
        undo.callback(delattr, module, adapter.name)
    setattr(module, adapter.name, adapter.made(module, attend))
