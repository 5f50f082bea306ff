"""What comes next in a function of Python's standard library."""

from __future__ import annotations

import ast
import keyword
import platform
import random
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from workbench.errors import BadParameter
from workbench.parameters import param
from workbench.tasks.base import Case, Encode, Generated
from workbench.tasks.scoring import Scorer
from workbench.tasks.words import words_of

_NAME = re.compile(r"[^\W\d]\w*")
_BODY = 6  # lines that a function has at least before what is asked


class Code(Generated):
    """A function of the running Python's standard library, cut off: its next line, or its next name.

    The text is the module from its beginning, or the last `length` tokens of it, up to what is asked. Every name that
    is asked for stands in the text already, so that the text answers. The same on one version of Python; another
    version has other sources.
    """

    key = "code"
    title = "Code completion"
    scorer: ClassVar[Scorer | None] = "line"

    target: Literal["line", "name"] = param("line", help="what is asked: the next line, or the next name")

    def make(self, encode: Encode, seed: int) -> Case:
        draw = random.Random(f"{self.key} {self.length} {self.target} {seed}")
        names = words_of("modules")
        draw.shuffle(names)
        for name in names:
            source = _source(name)
            places = list(_places(source, self.target)) if source else []
            draw.shuffle(places)
            for cut, answer in places[:8]:
                text = _last(source[:cut], self.length, encode)
                known = set(_NAME.findall(text))
                if all(word in known or keyword.iskeyword(word) for word in _NAME.findall(answer)):
                    line = source[:cut].count("\n") + 1
                    return self._case(text, answer, f"Python {platform.python_version()}, {name}, line {line}")
        raise BadParameter(f"length is {self.length}: no function of the library fits; give more")

    def _case(self, text: str, answer: str, origin: str) -> Case:
        if self.target == "line":
            question = "Which line of code comes next? Write that line and nothing else."
            return Case(text, question, (answer,), "line", goes_on=True, reply_tokens=40, origin=origin)
        question = "Which name comes next in this code? Write that name and nothing else."
        return Case(text, question, (answer,), "identifier", goes_on=True, reply_tokens=12, origin=origin)


def _source(module: str) -> str:
    """The source of a module; empty where this Python has none."""
    try:
        spec = find_spec(module)
    except ImportError:
        return ""
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")


def _places(source: str, target: Literal["line", "name"]) -> Iterator[tuple[int, str]]:
    """Where functions can be cut, as characters from the beginning, and what comes next there."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in ast.walk(function):
            if not isinstance(statement, ast.Assign | ast.Return | ast.Expr | ast.Raise | ast.AugAssign):
                continue
            first, line = statement.lineno - 1, lines[statement.lineno - 1]
            plain = statement.lineno == statement.end_lineno and '"' not in line and "'" not in line and "#" not in line
            if not plain or first - function.lineno < _BODY or len(_NAME.findall(line)) < 2:
                continue
            if target == "line":
                yield starts[first], line.strip()
            else:
                found = [m for m in _NAME.finditer(line) if len(m[0]) > 2 and not keyword.iskeyword(m[0])][1:]
                yield from ((starts[first] + match.start(), match[0]) for match in found[:1])


def _last(text: str, tokens: int, encode: Encode) -> str:
    """As many of the last whole lines as `tokens` tokens hold; all of them where they fit."""
    lines = text.splitlines(keepends=True)
    low, high = 1, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        if len(encode("".join(lines[-middle:]))) <= tokens:
            low = middle
        else:
            high = middle - 1
    return "".join(lines[-low:])
