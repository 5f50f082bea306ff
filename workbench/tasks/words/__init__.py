"""Lists of words from which texts are made: one a file."""

from __future__ import annotations

from importlib.resources import files


def words_of(name: str) -> list[str]:
    """The words of a list, each once."""
    return (files("workbench.tasks") / "words" / f"{name}.txt").read_text(encoding="utf-8").split()
