"""A method whose record is known: two presets, a default of its own, and words with capitals."""

from __future__ import annotations

from workbench.kv.base import KVMethod
from workbench.registry import Fidelity, Preset, param


class Windowed(KVMethod):
    """Keeps a window."""

    key, title, claim = "windowed", "Windowed", "none"
    fidelity = Fidelity("deviates", "MInference is not K-means")
    presets = (Preset("paper", "section 3", window=32), Preset("code", "who/what, run.py, 1234567", window=8, step=3))

    window: int = param(32, ge=1, le=64, help="how many stay")
    step: int = param(2, ge=1, le=9, help="how far apart", own="no source names it")
