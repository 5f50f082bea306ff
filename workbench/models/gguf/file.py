"""Reading a GGUF file as a plain transformers model, and turning it into a safetensors folder once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.models.gguf.header import read_header
from workbench.models.quiet import quiet
from workbench.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model of a GGUF file with its weights dequantised to `dtype`, and its tokenizer (None where it carries none).

    Raises `CheckpointRefused` for a file that is cut short, is not GGUF, or is not understood whole: transformers' own
    reader fills a missing tensor with random numbers and drops what it does not know.
    """
    header = read_header(path)
    with quiet():
        from workbench.models.gguf.architectures import config_of
        from workbench.models.gguf.tokenizer import read_tokenizer
        from workbench.models.gguf.weights import read_weights

        architecture, config = config_of(header)
        tokenizer = read_tokenizer(header, config.vocab_size, config.max_position_embeddings)
        model = read_weights(header, architecture, config, dtype)
    return model, tokenizer


def convert_gguf(path: Path, folder: Path, progress: Progress | None = None) -> None:
    """Write the model and tokenizer of a GGUF file into `folder` as float32 safetensors.

    float32, because it holds the dequantised values exactly. 16 bits would not: a Q4_1 weight is scale * q + minimum
    with 16-bit scale and minimum, and such a sum rarely fits into 16 bits again.
    """
    import torch
    from safetensors.torch import save_file

    progress = progress or Progress()
    progress.update("convert", 0, 3)
    model, tokenizer = read_gguf(path, torch.float32)
    progress.update("convert", 1, 3)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    progress.update("convert", 2, 3)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    progress.update("convert", 3, 3)
