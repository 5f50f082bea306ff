"""The C beside this file as a library: compiled once for a machine, where there is a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # first, so that the library shares the threads that torch has started

_SOURCES = tuple(Path(__file__).with_name(name) for name in ("token.c", "search.c"))
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
_CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())  # the first that compiles
_PATIENCE = 60  # seconds that a compiler may take


@cache
def library(folder: str) -> ctypes.CDLL | None:
    """The library, compiled into `folder` unless one for this source and machine is there; None without a compiler.

    Compiling takes less than a second on an idle machine. Nothing is raised: whoever asks has another way.
    """
    target = Path(folder) / f"library-{_fingerprint()}.so"
    if not target.is_file() and not _compiled(target):
        return None
    try:
        found = ctypes.CDLL(str(target))
    except OSError:
        return None
    for name, kinds in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = kinds, _INT if name in ("wb_code", "wb_leave", "wb_search") else None
    return found


_LONG, _PLACE, _FLOAT, _INT = ctypes.c_long, ctypes.c_void_p, ctypes.c_float, ctypes.c_int
_ARGUMENTS = {
    "wb_linear": (_INT, _PLACE, _PLACE, _FLOAT, _LONG, _LONG, *[_PLACE] * 4, _INT),
    "wb_leave": (_PLACE, _INT, *[_LONG] * 4, *[_PLACE] * 3, *[_LONG] * 4, _INT, _LONG),
    "wb_code": (_PLACE, _LONG, _INT, _PLACE, _PLACE, _PLACE, _INT),
    "wb_search": (*[_PLACE] * 4, *[_LONG] * 9, *[_PLACE] * 3, _INT),
    "wb_rotate": (_PLACE, _LONG, _LONG, _LONG, _PLACE, _PLACE),
    "wb_attend": (_PLACE, _PLACE, _PLACE, _LONG, _LONG, _LONG, _FLOAT, _FLOAT, _PLACE, _PLACE, _INT),
}


def _fingerprint() -> str:
    """Of the source, and of what the machine's processor can do: a library is not for another one."""
    features = [platform.machine(), platform.system(), platform.processor(), torch.__version__]
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        features += [line for line in cpus.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
    said = hashlib.sha256(b"".join(source.read_bytes() for source in _SOURCES))
    said.update("\n".join((*_FLAGS, *features)).encode())
    return said.hexdigest()[:16]


def _compiled(target: Path) -> bool:
    """Whether the source could be compiled into `target`, which appears whole or not at all."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as place:
            made = Path(place) / target.name
            for more in _CHOICES:
                command = [compiler, *_FLAGS, *more, *map(str, _SOURCES), "-o", str(made), "-lm"]
                done = subprocess.run(command, capture_output=True, check=False, timeout=_PATIENCE)  # noqa: S603
                if done.returncode == 0:
                    made.replace(target)
                    return True
    except (OSError, subprocess.TimeoutExpired):  # a folder that cannot be written, a compiler that does not end
        return False
    return False
