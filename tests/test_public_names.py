"""Names that users and plugins import stay where they are."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

NAMES = Path(__file__).with_name("public_names.txt").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("module", sorted({name.partition(":")[0] for name in NAMES}))
def test_what_was_importable_is_importable(module: str) -> None:
    loaded = import_module(module)
    names = [name.partition(":")[2] for name in NAMES if name.partition(":")[0] == module]
    assert [name for name in names if not hasattr(loaded, name)] == []
