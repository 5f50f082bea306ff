"""The places of a recipe, and which methods stand in each."""

from __future__ import annotations

from workbench.kv.base import KVMethod
from workbench.kv.methods.full import Full
from workbench.registry import Method, registered

CACHE_SLOTS = ("kv", "allocate", "store", "retrieve", "select", "evict")
RECIPE_SLOTS = (*CACHE_SLOTS, "weights", "attention")


def kv_methods(slot: str) -> list[type[Method]]:
    """The KV methods for one place: "kv" (which tokens stay), "allocate" (how many each head), "store", "retrieve",
    "select" (what a new token attends to), "evict" (what leaves while decoding, by the scores of the first).
    """
    methods: list[type[Method]] = []
    for cls in registered("kv"):
        assert issubclass(cls, KVMethod)
        fits = cls.only_rescores() if slot == "evict" else cls.contributes(slot)
        if slot == "kv":
            beside = cls.only_rescores() or any(map(cls.contributes, ("store", "retrieve", "select")))
            fits = cls.contributes("score") or not beside
        if fits:
            methods.append(cls)
    return sorted(methods, key=lambda cls: cls.key != Full.key)  # the uncompressed cache first


def methods_for(slot: str) -> list[type[Method]]:
    """The methods for one place of a recipe, of the cache or of another family."""
    return kv_methods(slot) if slot in CACHE_SLOTS else list(registered(slot))
