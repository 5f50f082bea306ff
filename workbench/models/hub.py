"""Models from the Hugging Face hub: safetensors and their text files, nothing else."""

from __future__ import annotations

from pathlib import Path

from workbench.errors import CheckpointRefused, DownloadFailed, ModelNotFound, WorkbenchError
from workbench.models.checkpoint import PICKLED
from workbench.models.quiet import quiet
from workbench.progress import Progress

_WANTED = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")
_PATIENCE = 10.0  # seconds to wait for the hub's first answer


def from_hub(repo: str, progress: Progress) -> Path:
    """The local folder of hub model `repo` ("org/name"): the hub's newest, or the cached one when the hub is away.

    A file in the local cache that is not as long as the hub's is fetched again: the client only looks at its name.

    Raises `ModelNotFound` where the hub knows no such model or does not let us see it, `CheckpointRefused` where it
    holds no safetensors, `DownloadFailed` where the hub does not answer and nothing is cached.
    """
    with quiet():
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

        progress.update("download", 0, 1)
        try:
            listed = HfApi().model_info(repo, timeout=_PATIENCE, files_metadata=True).siblings or []
            names = [file.rfilename for file in listed]
            if not any(name.endswith(".safetensors") for name in names):
                pickled = [name for name in names if Path(name).suffix in PICKLED]
                holds = (
                    f"only pickled weights ({pickled[0]}), which can run code" if pickled else "no safetensors weights"
                )
                raise CheckpointRefused(  # noqa: TRY301  (what the hub lists is known only here)
                    f"{repo} on the hub has {holds}; choose a model published as safetensors"
                )
            progress.check()
            folder = snapshot_download(repo, allow_patterns=list(_WANTED), etag_timeout=_PATIENCE)
            for file in listed:
                if _cut(Path(folder) / file.rfilename, getattr(file, "size", None)):
                    hf_hub_download(repo, file.rfilename, force_download=True, etag_timeout=_PATIENCE)
        except WorkbenchError:
            raise
        except HFValidationError as error:
            raise ModelNotFound(f"{repo!r} is no valid hub id ({error})") from error
        except RepositoryNotFoundError as error:
            raise ModelNotFound(
                f"the hub has no model {repo}, or it is private: check the name, or log in with `hf auth login`"
            ) from error
        except Exception as error:  # noqa: BLE001  (the client's HTTP library has changed twice, and its errors with it)
            folder = _from_cache(repo, error)
        progress.update("download", 1, 1)
    return Path(folder)


def _cut(path: Path, size: int | None) -> bool:
    return size is not None and path.is_file() and path.stat().st_size != size


def _from_cache(repo: str, error: Exception) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return str(snapshot_download(repo, allow_patterns=list(_WANTED), local_files_only=True))
    except LocalEntryNotFoundError:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadFailed(
            f"{repo} could not be downloaded from the model hub ({reason}) and is not in the local cache; check the "
            "network, or load a packaged model or a folder"
        ) from error
