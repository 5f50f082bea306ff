"""Methods are small: what a paper changes, and nothing that others could use, or that is better tested by itself.

A line of code is one with a token of Python that is no comment and no part of a docstring or an import. A method's own
code is what computes: what it declares, its parameters with their bounds and help, its paper, presets and other class
variables, is data and does not count to the medians; it does count to what no file may exceed.
"""

from __future__ import annotations

import ast
import inspect
import io
import tokenize
from pathlib import Path
from statistics import median

import pytest

from workbench.registry import Method, registered

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
MEDIANS = {"kv": 30, "weights": 55, "attention": 65, "operator": 65}
MOST = 150
SOURCES = {cls.key: Path(inspect.getfile(cls)) for cls in registered() if cls.__module__.startswith("workbench.")}


def code_lines(source: str, *, declared: bool) -> int:
    """Lines of code, with or without what classes declare."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", [])
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node, clean=False
        )
        left_out = [body[0]] if documented else []
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            left_out.append(node)
        if isinstance(node, ast.ClassDef) and not declared:
            left_out += [each for each in body if isinstance(each, ast.Assign | ast.AnnAssign)]
        for each in left_out:
            lines.difference_update(range(each.lineno, (each.end_lineno or each.lineno) + 1))
    return len(lines)


def test_lines_of_code_are_those_that_compute() -> None:
    source = '''"""A module."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from here import there

SIZE = 3  # a constant


class Small(Method):
    """What it does

    in two lines.
    """

    key = "small"
    size: int = param(
        SIZE, help="a parameter"
    )

    def scores(self):
        # only here
        """And how."""

        return (
            math.pi
        )
'''
    assert code_lines(source, declared=False) == 1 + 1 + 4  # the constant, the class, and its function
    assert code_lines(source, declared=True) == 6 + 4


@pytest.mark.parametrize("family", list(MEDIANS))
def test_most_methods_are_small(family: str) -> None:
    files = {SOURCES[cls.key] for cls in registered(family) if cls.key in SOURCES}
    assert median(code_lines(path.read_text(), declared=False) for path in files) <= MEDIANS[family]


@pytest.mark.parametrize("key", list(SOURCES))
def test_no_method_has_grown_too_large(key: str) -> None:
    assert code_lines(SOURCES[key].read_text(), declared=True) <= MOST


def test_what_registers_itself_as_a_method_is_counted() -> None:
    assert len(SOURCES) > 100 and all(issubclass(cls, Method) for cls in registered())
