"""What this machine and this installation offer: versions, devices, caches, kernels, extras."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from workbench.models import cache_dir, cached, catalogue
from workbench.version import __version__

_PACKAGES = ("torch", "transformers", "safetensors", "pydantic", "pandas", "plotly", "anywidget", "panel", "bokeh")
# extra -> modules that it brings
_EXTRAS = {
    "app": ("panel", "panel_material_ui", "bokeh", "plotly"),
    "gpu": ("triton",),
    "notebooks": ("jupyterlab", "ipykernel", "nbval", "anywidget", "ipywidgets", "plotly"),
    "weights": ("hqq",),
    "export": ("compressed_tensors",),
    "tasks": ("nltk",),
}


def report() -> dict[str, Any]:
    """Everything there is to know, JSON-able. Imports torch to ask for devices; loads no model, needs no network."""
    models = [
        {
            "name": entry.name,
            "title": entry.title,
            "here": (folder := cached(entry)) is not None,
            "folder": _text(folder),
        }
        for entry in catalogue()
    ]
    devices = _devices()
    return {
        "versions": {
            "workbench": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "devices": devices,
        "cache": {"folder": str(cache_dir()), "bytes": _size(cache_dir()), "models": models},
        "default_model": models[0],
        "kernels": _kernels(devices),
        "extras": {extra: all(find_spec(name) is not None for name in names) for extra, names in _EXTRAS.items()},
    }


def _devices() -> dict[str, Any]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    memory = psutil.virtual_memory()
    return {
        "cpu": {
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_bytes": memory.total,
            "free_bytes": memory.available,
        },
        "cuda": [{"name": device.name, "memory_bytes": device.total_memory} for device in gpus],
        "room": _room([device.total_memory for device in gpus], memory.available),
        "default": "cuda" if gpus else "cpu",
    }


def _room(gpus: list[int], host: int) -> dict[str, int]:
    """Parameters at 16 bits that nine tenths of memory hold: of one GPU, of all, and of all with free host memory.

    What is in host memory comes to a GPU for each pass; the other tenth is for caches and what is being computed.
    """
    places = {"one GPU": max(gpus, default=0), "all GPUs": sum(gpus), "with host memory": sum(gpus) + host}
    return {name: nbytes * 9 // 20 for name, nbytes in places.items()}


def _kernels(devices: dict[str, Any]) -> dict[str, Any]:
    """Which kernels the package holds, and whether Triton and CUDA are here to run compiled ones."""
    import workbench_kernels

    names = sorted(module.name for module in iter_modules(workbench_kernels.__path__))
    return {"triton": find_spec("triton") is not None, "cuda": bool(devices["cuda"]), "available": names}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _size(folder: Path) -> int:
    """Bytes of all files below; one that vanishes meanwhile counts nothing."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(top) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def lines(report: dict[str, Any]) -> list[str]:
    """A report as lines to read."""
    versions, devices, cache = report["versions"], report["devices"], report["cache"]
    cpu = devices["cpu"]
    out = ["versions"]
    out += [f"  {name:16}{value or 'not installed'}" for name, value in versions.items()]
    out += [
        "devices",
        f"  {'cpu':16}{cpu['cores']} cores, {_gib(cpu['memory_bytes'])} ({_gib(cpu['free_bytes'])} free)",
    ]
    out += [f"  {f'cuda:{i}':16}{gpu['name']}, {_gib(gpu['memory_bytes'])}" for i, gpu in enumerate(devices["cuda"])]
    out += [] if devices["cuda"] else [f"  {'cuda':16}none"]
    out.append("room for parameters at 16 bits, with a tenth of memory left (device_map spreads a model)")
    out += [f"  {name:16}{count / 1e9:.1f} billion" for name, count in devices["room"].items()]
    out += ["cache", f"  {'folder':16}{cache['folder']} ({_gib(cache['bytes'])})"]
    for model in cache["models"]:
        here = "here" if model["here"] else f"not here: workbench models fetch {model['name']}"
        out.append(f"  {model['name']:16}{here}")
    out += ["kernels", f"  {'triton':16}{'here' if report['kernels']['triton'] else 'not installed'}"]
    out += [f"  {'available':16}{', '.join(report['kernels']['available'])}", "extras"]
    hint = "not installed: pip install 'inference-workbench[{}]'"
    out += [f"  {extra:16}{'here' if there else hint.format(extra)}" for extra, there in report["extras"].items()]
    return out


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
