"""Rendering a chat template, which is a program that came with a model: in bounded time and memory, or BadPrompt.

transformers renders in Jinja's sandbox, which keeps a template from touching anything but does not make it end. Here
every loop, call and filter looks at the clock, and nothing that would become large is made.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Any

from workbench.errors import BadPrompt

if TYPE_CHECKING:
    from jinja2 import Environment, Template
    from transformers import PreTrainedTokenizerBase

_SECONDS = 2.0  # of this thread's work; real templates take a thousandth
_SIZE = 1 << 24  # characters of whatever a template makes; half of that is a prompt of 2 million tokens
_PER_ITEM = 16  # of a list: about what a place in it takes
_PER_BIT = 1 << 8  # of a long number, which takes long to multiply
# What some filters of Jinja are given before the value.
_OWN = ("EvalContext", "Context", "Bounded")
_TEMPLATE = 1 << 20  # characters of the template itself
_WIDTH = re.compile(r"\d{5,}")  # a width or precision in a format


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, generate: bool, **options: Any
) -> str:
    """The text that the tokenizer's chat template makes of `messages`; with the start of an answer if `generate`.

    The same text as `tokenizer.apply_chat_template`. Templates of models that see images may take a content only as a
    list of parts: where one does not write what is said, it is given these. Raises BadPrompt, in one line, for a
    template that is broken, that refuses these messages, that touches what it must not, or that does not end soon.
    """
    said = [m["content"].strip() for m in messages if isinstance(m.get("content"), str)]

    def written(text: str) -> bool:
        return all(words in text for words in said)

    refused, whole = None, ""
    try:
        whole = _rendered(tokenizer, messages, generate=generate, **options)
    except BadPrompt as error:
        refused = error
    if refused is None and written(whole):
        return whole
    with suppress(BadPrompt):
        parted = _rendered(tokenizer, [_in_parts(message) for message in messages], generate=generate, **options)
        if said and written(parted):
            return parted
    if refused is not None:
        raise refused
    return whole


def _in_parts(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], *, generate: bool, **options: Any
) -> str:
    try:
        source = tokenizer.get_chat_template(options.pop("chat_template", None))
        spent = _Spent()
        context = {
            **tokenizer.special_tokens_map,
            "messages": [{key: value for key, value in message.items() if value is not None} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": generate,
            **options,
        }
        pieces, length = [], 0
        for piece in _compiled(source, spent).generate(context):
            length += len(piece)
            spent.hold(length, "its text")
            spent.tick()
            pieces.append(piece)
        return "".join(pieces)
    except BadPrompt:
        raise
    except RecursionError:
        raise BadPrompt("the model's chat template calls itself without an end; give plain text (chat=False)") from None
    except Exception as error:  # a template can raise whatever Python can
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadPrompt(
            f"the model's chat template does not take these messages ({reason}); change them, or give plain text "
            "(chat=False)"
        ) from error


class _Spent:
    """How much a rendering has used, and where it stops."""

    def __init__(self) -> None:
        self.until = time.thread_time() + _SECONDS

    def tick(self) -> None:
        if time.thread_time() > self.until:
            raise BadPrompt(
                f"the model's chat template did not end within {_SECONDS:.0f} seconds; give plain text (chat=False)"
            )

    def hold(self, size: int, what: str) -> None:
        if size > _SIZE:
            raise BadPrompt(
                f"the model's chat template makes {what} of {size:,} characters, more than the {_SIZE:,} allowed; "
                "give plain text (chat=False)"
            )


def _compiled(source: str, spent: _Spent) -> Template:
    if len(source) > _TEMPLATE:
        raise BadPrompt(
            f"the model's chat template has {len(source):,} characters, more than the {_TEMPLATE:,} allowed"
        )
    return _environment(spent).from_string(source)


def _environment(spent: _Spent) -> Environment:
    """transformers' environment, with every loop, call, filter and operator watched by `spent`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %}: marks what a model is trained on, and changes no text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Watched(NodeTransformer):
        """Loops run over what is watched, ~ is the filter that joins, and what is put together is measured."""

        def visit_For(self, node: Any) -> Any:  # noqa: N802  (jinja2's name)
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "_watched", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802  (jinja2's name)
            self.generic_visit(node)
            items = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(items, "_joined", [], [], None, None, lineno=node.lineno)

        def visit_List(self, node: Any) -> Any:  # noqa: N802  (jinja2's name)
            self.generic_visit(node)
            if getattr(node, "ctx", "load") != "load":  # a tuple that is assigned to
                return node
            return nodes.Filter(node, "_made", [], [], None, None, lineno=node.lineno)

        visit_Tuple = visit_Dict = visit_List  # noqa: N815

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return Watched().visit(super()._parse(source, name, filename))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            spent.tick()
            spent.hold(_size_of(operator, left, right), "a value")
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            spent.tick()
            method = getattr(called, "__wrapped__", called)  # the sandbox wraps str.format
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str | bytes):
                args = tuple(map(_settled, args))
                spent.hold(_grown(method.__name__, owner, [*args, *kwargs.values()]), "a text")
            return super().call(context, called, *args, **kwargs)

    def made(value: Any) -> Any:
        spent.hold(_length(value), "a value")
        return value

    env = Bounded(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, loopcontrols],
        optimized=False,
        finalize=made,
    )

    def watched(items: Iterable[Any]) -> Iterable[Any]:
        return _Ticking(items, spent)

    def joined(items: list[Any]) -> str:
        made(items)
        texts = [str(item) for item in items]
        spent.hold(sum(map(len, texts)), "a text")
        return "".join(texts)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    env.filters["tojson"] = tojson
    env.filters = {name: _bounded(name, call, spent) for name, call in env.filters.items()}
    env.filters |= {"_watched": watched, "_joined": joined, "_made": made}
    env.globals.pop("lipsum", None)
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda layout: datetime.now().astimezone().strftime(layout)
    return env


class _Ticking:
    """Items that look at the clock as they are taken; as long as what they come from, where that has a length."""

    def __init__(self, items: Iterable[Any], spent: _Spent) -> None:
        self.items, self.spent = items, spent

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.spent.tick()
            yield item

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]


def _bounded(name: str, call: Callable[..., Any], spent: _Spent) -> Callable[..., Any]:
    """A filter that looks at the clock and at the size of what it would make."""

    @wraps(call)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        spent.tick()
        if name == "join":
            args = tuple(map(_settled, args))
        given = [arg for arg in (*args, *kwargs.values()) if type(arg).__name__ not in _OWN]
        if given:
            spent.hold(_grown(name, given[0], given[1:]), "a text")
        made = call(*args, **kwargs)
        return _Ticking(made, spent) if isinstance(made, Iterator) else made

    return filtered


def _settled(value: Any) -> Any:
    """What is taken one by one as a list, whose length is known."""
    return list(value) if isinstance(value, Iterator | _Ticking | range) else value


def _length(value: Any) -> int:
    """About how many characters' room a value takes, with all that lies in it; counted no further than is allowed.

    Only what is allowed is ever put into another, so a value that lies twice in a list is counted twice.
    """
    total, waiting = 0, [value]
    while waiting and total <= _SIZE:
        item = waiting.pop()
        if isinstance(item, str | bytes):
            total += len(item)
        elif isinstance(item, int) and item.bit_length() > 64:
            total += item.bit_length() * _PER_BIT
        elif isinstance(item, list | tuple | dict):
            total += len(item) * _PER_ITEM
            waiting.extend([*item, *item.values()] if isinstance(item, dict) else item)
    return total


def _size_of(operator: str, left: Any, right: Any) -> int:
    """About how large the result of an operator is."""
    if operator == "+":
        return _length(left) + _length(right)
    if operator == "%" and isinstance(left, str | bytes):
        return _formatted(left, right if isinstance(right, tuple) else [right])
    if operator == "**":
        return _length(left) * abs(right) if isinstance(right, int) and isinstance(left, int) else 1
    if operator == "*":
        times = [value for value in (left, right) if isinstance(value, int)]
        others = [value for value in (left, right) if not isinstance(value, int)]
        if len(times) == 1 and isinstance(others[0], str | bytes | list | tuple):
            return _length(others[0]) * max(times[0], 0)
        return _length(left) + _length(right)
    return 1


def _grown(name: str, owner: Any, given: Sequence[Any]) -> int:
    """About how large a text becomes by the method or filter of this name."""
    numbers = [abs(value) for value in given if isinstance(value, int)]
    if name in ("format", "format_map"):
        return _formatted(owner, given)
    if name == "replace" and len(given) > 1 and isinstance(owner, str):
        return len(owner) + owner.count(str(given[0])) * len(str(given[1]))
    if name == "join":
        items = given[0] if isinstance(owner, str) and given else owner
        between = owner if isinstance(owner, str) else (given[0] if given else "")
        count = len(items) if isinstance(items, list | tuple | dict | str) else 1
        return _length(items) + len(str(between)) * count
    if name in ("center", "ljust", "rjust", "zfill", "slice", "batch", "truncate"):
        return max([_length(owner), *numbers])
    return _length(owner) * max([1, *numbers])


def _formatted(layout: Any, given: Iterable[Any]) -> int:
    """A format may ask for any width, in its text or through its arguments."""
    text = layout.decode("latin-1") if isinstance(layout, bytes) else str(layout)
    if _WIDTH.search(text):
        return _SIZE + 1
    numbers = [abs(value) for value in given if isinstance(value, int)]
    return max([0, *numbers]) * ("*" in text or "{" in text) + len(text) + _length(list(given))
