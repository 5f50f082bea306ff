"""A page as a file: what stands in its controls, and its runs; kept on the server as one works, saved and opened."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from workbench.errors import InputError, WorkbenchError
from workbench.files import strict_json
from workbench.models.fetch import cache_dir
from workbench.results.schema import COLUMNS as RESULTS
from workbench.results.schema import checked
from workbench_widgets.app.state.page_state import PageState
from workbench_widgets.app.work.records import Record

FORMAT = "inference-workbench page"
VERSION = 1  # raise it when an older workbench could no longer read what is written
_NAME = re.compile(r"[A-Za-z0-9_-]{22}")  # of a page that is kept: nobody guesses it
_LARGEST = 16 << 20  # bytes of a file
_MOST = 100  # pages that are kept, the newest
_TEXT = "text_of"  # in place of a text: which of the file's texts it is


@dataclass(frozen=True)
class SavedPage:
    """What is saved of a page."""

    page: PageState = field(default_factory=PageState)
    records: tuple[Record, ...] = ()

    def to_text(self) -> str:
        """As JSON; each text stands in it once."""
        texts: dict[str, str] = {}

        def packed(page: Mapping[str, Any]) -> dict[str, Any]:
            if not (text := page.get("text")):
                return dict(page)
            key = sha256(text.encode()).hexdigest()[:16]
            texts[key] = text
            return {name: value for name, value in page.items() if name != "text"} | {_TEXT: key}

        records = [record.to_dict() for record in self.records]
        return strict_json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "page": packed(self.page.to_dict()),
                "records": [{**record, "page": packed(record["page"])} for record in records],
                "texts": texts,
            }
        )

    @classmethod
    def from_text(cls, text: str) -> SavedPage:
        """What `to_text` wrote. Raises InputError, in one line, for what is none or does not fit."""
        if len(text) > _LARGEST:
            raise InputError(f"this is no saved page: it is longer than {_LARGEST:,} characters")
        try:
            data = strict_json.loads(text)
            _check_format(data)
            texts = data["texts"]

            def unpacked(page: Mapping[str, Any]) -> dict[str, Any]:
                if _TEXT not in page:
                    return dict(page)
                return {name: value for name, value in page.items() if name != _TEXT} | {"text": texts[page[_TEXT]]}

            page = PageState.from_dict(unpacked(data["page"]))
            records = tuple(_record(record, unpacked(record["page"])) for record in data["records"])
        except InputError:
            raise
        except WorkbenchError as error:
            raise InputError(f"this saved page does not fit: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            raise InputError(f"this is no saved page: {type(error).__name__} {reason}") from error
        return cls(page, records)


def _check_format(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise InputError("this is no saved page of the workbench")
    if data["version"] != VERSION:
        raise InputError(f"this page was saved by another version of the workbench ({data['version']!r})")


def _record(data: Mapping[str, Any], page: dict[str, Any]) -> Record:
    row = data["row"]
    checked({name: value for name, value in row.items() if name in RESULTS} | {"key": "page"})
    for name in ("run", "turn"):
        if not isinstance(row[name], int) or not 0 < row[name] < 2**31:
            raise ValueError(f"{name} is no number of a run")
    if not isinstance(row["name"], str | None):
        raise TypeError("the name of a run is a text")
    return Record.from_dict({**data, "page": page})


class KeptPages:
    """Pages that are kept on the server, each under a name that nobody guesses; the newest stay.

    folder: where they lie (default: in the user's cache). Where nothing can be written, nothing is kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "pages"

    @staticmethod
    def new_name() -> str:
        return secrets.token_urlsafe(16)

    def keep(self, name: str, saved: SavedPage) -> bool:
        """Write a page, whole or not at all; whether it is there now."""
        text = saved.to_text()
        if len(text) > _LARGEST:
            return False
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle, part = tempfile.mkstemp(dir=self.folder, prefix=".page-")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                Path(part).replace(self._path(name))
            finally:
                Path(part).unlink(missing_ok=True)
            self._thin()
        except OSError:
            return False
        return True

    def find(self, name: str) -> SavedPage | None:
        """The page of this name; None where there is none, or it cannot be read."""
        if not _NAME.fullmatch(name):
            return None
        try:
            path = self._path(name)
            if path.stat().st_size > _LARGEST:
                return None
            return SavedPage.from_text(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, InputError):
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _thin(self) -> None:
        paths: Sequence[Path] = sorted(self.folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for path in paths[_MOST:]:
            with suppress(OSError):
                path.unlink()
