"""A text with images as its model's own processor prepares it: token ids, pixel values, and which token is of which.

Images are PIL images, arrays [height, width, 3] or [height, width] of whole numbers up to 255, or paths of files;
nothing is fetched. In a text "<image>", or the processor's own mark, says where one stands; without a mark all stand
before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workbench.engine.images import Images
from workbench.errors import BadPrompt, MissingExtra
from workbench.files.paths import place, regular
from workbench.formatting import quoted
from workbench.models.literal_text import control_tokens
from workbench.models.quiet import quiet

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    Picture = Image | np.ndarray | str | PathLike[str]

MARK = "<image>"
_MOST_BYTES = 1 << 28  # of an image's file
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_processor(given: object) -> bool:
    """Whether this prepares texts and images together, as transformers' processors do."""
    return getattr(given, "image_processor", None) is not None and getattr(given, "tokenizer", None) is not None


def tokenizer_of(processor: ProcessorMixin) -> PreTrainedTokenizerBase:
    """A processor's tokenizer, which chats by the processor's template where it has none."""
    from copy import copy

    source: Any = processor
    tokenizer: PreTrainedTokenizerBase = source.tokenizer
    template = getattr(processor, "chat_template", None)
    if template and not getattr(tokenizer, "chat_template", None):
        tokenizer = copy(tokenizer)
        tokenizer.chat_template = template
    return tokenizer


def picture(source: Any, number: int) -> Image:
    """The image that a source stands for, in RGB. number: which it is, for messages. Raises BadPrompt, MissingExtra."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("images need Pillow: install it with pip install 'inference-workbench[images]'") from None
    which = f"image {number}"
    if isinstance(source, str | PathLike):
        name = str(source)
        if _URL.match(name):
            raise BadPrompt(
                f"{which} is an address ({quoted(name)}), and nothing is fetched: give a file, or the image"
            )
        try:
            with Image.open(regular(place(name), _MOST_BYTES)) as found:
                return found.convert("RGB")
        except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
            raise BadPrompt(f"{which}, {quoted(name, 200)}, is no image that can be read ({_line(error)})") from None
        except OSError as error:
            raise BadPrompt(f"{which}: cannot read {quoted(name, 200)}: {error.strerror or _line(error)}") from None
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        colours = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
        whole = np.issubdtype(source.dtype, np.integer)
        if not (colours and whole and source.size) or source.min() < 0 or source.max() > 255:
            raise BadPrompt(
                f"{which} is an array {list(source.shape)} of {source.dtype}: give [height, width, 3] or [height, "
                "width], whole numbers from 0 to 255"
            )
        return Image.fromarray(source.astype(np.uint8)).convert("RGB")
    raise BadPrompt(f"{which} is a {type(source).__name__}: give a PIL image, an array, or the path of a file")


def messages_of(text: Any, images: Sequence[Any], processor: ProcessorMixin) -> tuple[list[dict[str, Any]], list[Any]]:
    """Chat messages whose contents are parts, text or image, and the images in their order.

    text: a user's words with marks where images stand (none: before the words), or messages; contents of these may have
    images in their parts. Raises BadPrompt.
    """
    if isinstance(text, str):
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in placed(text, len(images), processor)
        ]
        return [{"role": "user", "content": content}], list(images)
    waiting, found = list(images), []
    messages = []
    for message in text:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadPrompt(f'a chat message needs "role" and "content", not {quoted(message)}')
        parts: list[dict[str, Any]] = []
        said = message.get("content")
        for part in [{"type": "text", "text": said}] if isinstance(said, str) else said or ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind != "image":
                raise BadPrompt(
                    f'a part of a message is {{"type": "text", "text": ...}} or {{"type": "image"}}, not {quoted(part)}'
                )
            source = next((part[name] for name in ("image", "path", "url") if part.get(name) is not None), None)
            if source is None and not waiting:
                raise BadPrompt("the messages have more places for images than images were given")
            found.append(waiting.pop(0) if source is None else source)
            parts.append({"type": "image"})
        messages.append({**message, "content": parts})
    if waiting:
        raise BadPrompt(
            f"the messages have no place for {len(waiting)} of {len(images)} images: add "
            '{"type": "image"} to their contents'
        )
    return messages, found


def placed(text: str, count: int, processor: ProcessorMixin) -> list[str | None]:
    """A text cut at its marks: words, and None where an image stands. Raises BadPrompt for other marks than images."""
    marks = {MARK, image_mark(processor)}
    words = re.split("|".join(map(re.escape, sorted(marks, key=len, reverse=True))), text)
    if len(words) == 1:
        return [*[None] * count, text]
    if len(words) - 1 != count:
        raise BadPrompt(f"the text has {len(words) - 1} marks for images ({MARK}), but {count} images were given")
    parts: list[str | None] = [words[0]]
    for part in words[1:]:
        parts += [None, part]
    return [part for part in parts if part is None or part.strip()]


def image_mark(processor: ProcessorMixin) -> str:
    """What the processor puts an image's tokens in the place of."""
    return str(getattr(processor, "image_token", None) or MARK)


def check_words(words: str, processor: ProcessorMixin) -> None:
    """Raise BadPrompt where somebody's words spell a token that steers the model: a processor would read it as one."""
    tokenizer = tokenizer_of(processor)
    spelled = [name for name in (*control_tokens(tokenizer).values(), image_mark(processor)) if name in words]
    if spelled:
        raise BadPrompt(
            f"the text spells {quoted(spelled[0])}, which steers the model, and beside images it cannot be read as "
            "letters: leave it out"
        )


def processed(text: str, sources: Sequence[Any], processor: ProcessorMixin, token: int | None) -> tuple[Tensor, Images]:
    """The ids [n] of a whole text with marks, and its images as its processor prepares them.

    token: the id that stands for a part of an image. Raises BadPrompt.
    """
    pictures = [picture(source, number) for number, source in enumerate(sources, 1)]
    tokenizer: Any = tokenizer_of(processor)
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # by the chat template
    made = _prepared(processor, text, pictures, special=not begun)
    ids = made.pop("input_ids")[0].long()
    made.pop("attention_mask", None)
    inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
    if left := sorted(set(made) - set(inputs)):
        raise BadPrompt(f"{type(processor).__name__} gives {', '.join(left)} in a form that is not supported")
    mask = ids == (-1 if token is None else token)
    counts = [int(mask.sum())]
    if len(pictures) > 1:
        alone = [_prepared(processor, image_mark(processor), [one], special=False) for one in pictures]
        counts = [int((one["input_ids"][0] == token).sum()) for one in alone]
    if not all(counts) or sum(counts) != int(mask.sum()):
        raise BadPrompt(f"{type(processor).__name__} does not show which tokens stand for which image; not supported")
    which = torch.full_like(ids, -1)
    which[mask] = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return ids, Images(inputs, ids, which)


def _prepared(processor: Any, text: str, pictures: Sequence[Image], *, special: bool) -> dict[str, Any]:
    try:
        with quiet():
            made = processor(text=[text], images=[list(pictures)], return_tensors="pt", add_special_tokens=special)
    except Exception as error:  # a processor says what it does not take in its own ways
        raise BadPrompt(
            f"{type(processor).__name__} does not take this text with these images ({_line(error)})"
        ) from error
    return dict(made)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def folder_has_images(folder: Path) -> bool:
    """Whether a checkpoint folder carries a processor of images."""
    return any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json"))
