"""Every weight and every attention method keeps its family's promises.

Those of cache methods are in tests/kv/test_methods.py, those of operators in tests/attention/test_operators.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from workbench.registry import Method, find, registered
from workbench.testing import Subjects, check_promise, promises

SMALL: dict[str, dict[str, Any]] = {  # searches of seconds
    "evopress": {"of": "rtn", "generations": 1, "offspring": 2, "texts": 2, "tokens": 16, "slopes": 0},
    "foldgpt": {"steps": 2},
    "ziplm": {"starts": 2, "patience": 1, "texts": 2, "tokens": 16},
    "evopress-depth": {"generations": 1, "offspring": 2, "beginnings": 2, "texts": 2, "tokens": 16},
    "cospadi": {"rounds": 2},
}
OTHERWISE: list[tuple[str, dict[str, Any]]] = [  # parameters that take another way through a method
    ("awq", {"fold": False}),
    ("gptq", {"group_aware": True, "mse": True}),
    ("gptq", {"sequential": False}),
    ("activations", {"form": "fp8", "static": True}),
    ("svd-llm", {"update": True}),
    ("flashsvd", {"metric": "outputs"}),
    ("coreinfer", {"prediction": "similarity", "groups": 2}),
    ("greenformers", {"solver": "snmf", "iterations": 3}),
    ("easyquant", {"symmetric": False, "bits": 3}),
    ("vptq", {"index_bits": 6, "residual_bits": 4, "vector_length": 3, "rounds": 3}),
    ("bitstack", {"blocks": 3}),
]


@pytest.mark.parametrize("cls", [*registered("weights"), *registered("attention")], ids=lambda cls: cls.key)
def test_every_weight_and_attention_method_keeps_every_promise(cls: type[Method], subjects: Subjects) -> None:
    for promise in promises(cls):
        check_promise(promise, cls, subjects, **SMALL.get(cls.key, {}))


@pytest.mark.parametrize(("key", "parameters"), OTHERWISE, ids=lambda value: value if isinstance(value, str) else "")
def test_so_do_they_with_other_parameters(key: str, parameters: dict[str, Any], subjects: Subjects) -> None:
    for promise in promises(find(key)):
        check_promise(promise, find(key), subjects, **parameters)
