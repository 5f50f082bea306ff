"""Cases from files: what is wrong with an entry is one line about it, and the other entries stay good."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from workbench import arguments
from workbench.errors import BadParameter, BadPrompt
from workbench.files.paths import place, regular
from workbench.files.strict_json import loads
from workbench.formatting import quoted
from workbench.parameters import param
from workbench.tasks.base import Case, Encode, Task

_LARGEST = 1 << 30  # bytes of a file

Entry = Case | str
"""A case, or what is wrong with it: where it stands and why, in one line."""


class Malformed(ValueError):
    """What is wrong with an entry, without where it stands."""


class FromFile(Task):
    """A task whose cases stand in a file of JSON objects, one a line, or in one list.

    A subclass says in `entry` what each object means. Files are read once, when the first case is asked for.
    """

    path: str = param("", help="the file")
    seed: int = param(0, ge=0, help="the case to begin with")

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All of the file in order. Raises BadParameter, BadPrompt where it cannot be read at all."""
        found = tuple(self._read(located(self.key, self.path)))
        if not found:
            raise BadPrompt(f"{self.path} is empty: there is no case in it")
        return found

    @property
    def available(self) -> int:
        return max(len(self.entries) - self.seed, 0)

    def make(self, encode: Encode, seed: int) -> Case:
        if seed >= len(self.entries):
            raise BadParameter(f"{self.key}: {self.path} has {len(self.entries)} cases, the first is 0: no case {seed}")
        entry = self.entries[seed]
        if isinstance(entry, str):
            raise BadPrompt(entry)
        return entry

    def _read(self, path: Path) -> Iterator[Entry]:
        for where, found in objects(path):
            if isinstance(found, str):
                yield f"{where}: {found}"
                continue
            try:
                yield from self.entry(found, where)
            except Malformed as problem:
                yield f"{where}: {problem}"

    @abstractmethod
    def entry(self, found: dict[str, Any], where: str) -> Sequence[Entry]:
        """The cases of one object. Raises Malformed."""


def located(key: str, path: str) -> Path:
    """The path of a task's file or folder. Raises BadParameter where none is given."""
    if not path:
        raise BadParameter(f"{key}: path is missing: say where the file is, as path='cases.jsonl'")
    try:
        return place(arguments.path("path", path))
    except OSError as error:
        raise BadPrompt(f"cannot read {quoted(path, 200)}: {error.strerror or error}") from error


def text_of(path: Path) -> str:
    """The text in a file. Raises BadPrompt."""
    try:
        text = regular(place(path), _LARGEST).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadPrompt(f"cannot read {quoted(str(path), 200)}: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise BadPrompt(f"{quoted(str(path), 200)} is not text in UTF-8: convert it first") from None
    if "\0" in text:
        raise BadPrompt(f"{quoted(str(path), 200)} is not text in UTF-8: convert it first")
    return text


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The JSON objects of a file, each with where it stands; in place of one that is none, what is wrong with it."""
    text = text_of(path)
    if text.lstrip().startswith("["):
        yield from _listed(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found: dict[str, Any] | str = loads(line)
        except json.JSONDecodeError as error:
            found = f"not JSON: {error.msg} at character {error.colno}"
        except ValueError as error:
            found = str(error)
        yield f"{path.name}, line {number}", found


def _listed(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any] | str]]:
    try:
        found = loads(f'{{"entries": {text}}}')["entries"]
    except ValueError as error:
        raise BadPrompt(f"{quoted(str(path), 200)} is not JSON: {error}") from error
    for number, one in enumerate(found, 1):
        yield (
            f"{path.name}, entry {number}",
            one if isinstance(one, dict) else f"an object is expected, not {quoted(one)}",
        )


def text_in(found: dict[str, Any], *names: str) -> str:
    """The text under the first of the names that is there. Raises Malformed."""
    for name in names:
        if name in found:
            if not isinstance(found[name], str) or not found[name].strip():
                raise Malformed(f"{name!r} must be a text with something in it, not {quoted(found[name])}")
            return str(found[name])
    raise Malformed(f"{' or '.join(map(repr, names))} is missing")


def texts_in(found: dict[str, Any], name: str) -> tuple[str, ...]:
    """The texts or numbers in the list under a name, as texts. Raises Malformed."""
    given = found.get(name)
    if not isinstance(given, list) or not given or not all(_written(one) for one in given):
        raise Malformed(f"{name!r} must be a list of texts, not {quoted(given)}")
    return tuple(str(one) for one in given)


def _written(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip() != ""
