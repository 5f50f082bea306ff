"""What a model itself says, where no text is given to calibrate on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.engine.attention_hook import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sampled_texts(model: PreTrainedModel, texts: int, tokens: int, seed: int) -> Tensor:
    """What the model itself says from its first token on, int64 [texts, tokens], drawn at temperature 1.

    The draw depends on the model and `seed` alone, and leaves the global random state as it is. A model without a first
    token begins with a drawn one.
    """
    config: Any = model.config.get_text_config()
    device = device_of(model)
    draw = torch.Generator().manual_seed(seed)
    first = getattr(config, "bos_token_id", None)
    if first is None:
        ids = torch.randint(0, config.vocab_size, (texts, 1), generator=draw)
    else:
        ids = torch.full((texts, 1), int(first))
    cache = None
    with torch.inference_mode():
        while ids.shape[1] < tokens:
            given = ids if cache is None else ids[:, -1:]  # models without a cache read all of it again
            output = model(input_ids=given.to(device), past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            chances = output.logits[:, -1].float().cpu().softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
    return ids.to(device)
