"""The text: Python's documentation, standard library and its tests, split by document and written as token files."""

from __future__ import annotations

import json
import random
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from training.vocabulary import END, SIZE, train_vocabulary
from training.wordings import sample_text
from workbench.errors import BadParameter

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# kind -> how often a row is drawn from it
KINDS = {"documentation": 0.45, "library": 0.35, "tests": 0.2}

# Encodings are tables; pydoc_data repeats the documentation, held-out pages too.
_LEFT_OUT = {"idlelib", "site-packages", "encodings", "pydoc_data", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_LONGEST = 400_000  # bytes of a module: above that it is data
_TASK_TEXT = 2_000_000  # characters of task wordings that the vocabulary is learned from, beside the corpus


@dataclass(frozen=True)
class Document:
    """One page of the documentation or one module of the standard library."""

    kind: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Whether it is kept from training: one document in 25, by its name."""
        return zlib.crc32(f"{self.kind} {self.name}".encode()) % 25 == 0


def documentation(folder: Path) -> Iterator[Document]:
    """The reStructuredText sources below `folder` (of CPython's Doc, or the _sources of a built documentation)."""
    pages = sorted(path for path in folder.rglob("*") if path.name.endswith((".rst", ".rst.txt")) and path.is_file())
    if not pages:
        raise BadParameter(
            f"{folder} holds no reStructuredText: give the folder of the sources of Python's documentation"
        )
    for path in pages:
        name = path.relative_to(folder).as_posix().removesuffix(".txt")
        yield Document("documentation", name, path.read_text(encoding="utf-8"))


def standard_library(folder: Path | None = None) -> Iterator[Document]:
    """The modules of the running Python's standard library, its tests as a kind of their own."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder)
        if _LEFT_OUT.isdisjoint(inside.parts) and path.stat().st_size <= _LONGEST:
            kind = "library" if _TESTS.isdisjoint(inside.parts) else "tests"
            yield Document(kind, inside.as_posix(), path.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class Corpus:
    """Token files and their tokenizer in one folder, as `build_corpus` leaves them."""

    folder: Path

    @property
    def tokenizer(self) -> Tokenizer:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def tokens(self, kind: str, part: str = "train") -> np.ndarray:
        """uint16 [n]: the documents of a kind one after another, each ended by END. part: "train" or "held-out"."""
        return np.fromfile(self.folder / f"{kind}.{part}.bin", dtype=np.uint16)

    def bytes_per_token(self, kind: str, part: str) -> float:
        """How many bytes of UTF-8 a token of these documents stands for."""
        counts = json.loads((self.folder / "corpus.json").read_text())[kind][part]
        return float(counts["bytes"] / counts["tokens"])


def build_corpus(pages: Path, out: Path, library: Path | None = None, size: int = SIZE) -> Corpus:
    """Learn the vocabulary from the training documents and write every document's tokens to `out`.

    pages: where the documentation's sources lie. library: modules, by default the running Python's.
    """
    documents = [*documentation(pages), *standard_library(library)]
    training = [document.text for document in documents if not document.held_out]
    tokenizer = train_vocabulary([*training, sample_text(random.Random(0), _TASK_TEXT)], size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    counts: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for part in ("train", "held-out"):
            chosen = [d.text for d in documents if d.kind == kind and d.held_out == (part == "held-out")]
            encoded = [encoding.ids for encoding in tokenizer.encode_batch(chosen, add_special_tokens=False)]
            joined = np.array([token for ids in encoded for token in (*ids, END)], dtype=np.uint16)
            joined.tofile(out / f"{kind}.{part}.bin")
            nbytes = sum(len(text.encode()) for text in chosen)
            counts[kind][part] = {"documents": len(chosen), "bytes": nbytes, "tokens": len(joined)}
    (out / "corpus.json").write_text(json.dumps(counts, indent=1))
    return Corpus(out)
