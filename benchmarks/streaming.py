"""Endless text under StreamingLLM: 100,000 tokens of the standard library that workbench-tiny was not trained on go
through a cache of 512. Nats a token in stretches of 10,000, against reading the last tokens again for every stretch.

Tokens enter 16 at a time, for which room is made first, as the authors' code makes it for a whole turn. The first
20,000 tokens also without sinks (window attention), with true positions, and, beyond the model's 2,048 positions, with
the whole cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import workbench as wb
from benchmarks.record import environment, write
from training.corpus import standard_library
from workbench.kv.plan import Plan
from workbench.kv.stores.closed_up import places
from workbench.runtime.decode import Decoder

TOKENS, SHORT, DENSE = 100_000, 20_000, 8_000
STRETCH, STEP = 10_000, 16
FIRST, CACHE = 1024, 512  # read at once in the beginning; entries of a head that stay
MODEL = "workbench-tiny"


@dataclass
class Streamed:
    """What a stream of tokens left: nats of each token after the first, the most bytes, and where entries stood."""

    nats: list[float] = field(default_factory=list)
    nbytes: int = 0
    furthest: int = 0
    position: int = 0

    def stretches(self) -> list[float]:
        """The mean of every stretch."""
        return [mean(part) for part in batched(self.nats, STRETCH)]


def batched(nats: list[float], size: int) -> Iterator[list[float]]:
    """Whole parts of a list; what is left at the end belongs to none."""
    values = iter(nats)
    while len(part := list(islice(values, size))) == size:
        yield part


def held_out_text(session: wb.Session, tokens: int) -> Tensor:
    """So many ids [n] of modules that are kept from training, one after another in the order of their names."""
    tokenizer, ids = session.tokenizer, []
    assert tokenizer is not None
    for document in sorted(standard_library(), key=lambda document: document.name):
        if document.held_out and document.kind == "library":
            ids += tokenizer(document.text)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor(ids[:tokens])
    raise SystemExit(f"the standard library holds {len(ids)} tokens that were kept from training, not {tokens}")


def stream(session: wb.Session, plan: Plan, ids: Tensor, *, closed_up: bool) -> Streamed:
    """Read what follows the prompt in steps, and what the model gives to every next token."""
    evicting = plan.stages.evict if plan.evicts else None
    decoder = Decoder(session.model, plan.stores(), plan.position, evicting)
    streamed, before = Streamed(), plan.logits[None]
    for part in ids[FIRST:].split(STEP):
        logits = decoder.feed(part, logits=part.numel())
        rows = torch.cat([before, logits[:-1].cpu()])
        streamed.nats += cross_entropy(rows, part, reduction="none").tolist()
        before = logits[-1:].cpu()
        streamed.nbytes = max(streamed.nbytes, sum(store.nbytes for store in decoder.stores))
        where, valid = decoder.stores[0].slots()
        stand = places(where, valid) if closed_up else where
        streamed.furthest = max(streamed.furthest, int(stand.max()))
    streamed.position = decoder.position
    return streamed


def recomputed(session: wb.Session, ids: Tensor) -> list[float]:
    """The same nats with a fresh reading for every 512 tokens: each sees the 512 to 1,023 before it, and no others."""
    nats: list[float] = []
    for start in range(FIRST - CACHE, ids.numel() - CACHE, CACHE):
        window = ids[start : start + 2 * CACHE]
        with torch.inference_mode():
            logits = session.model(window[None]).logits[0]
        nats += cross_entropy(logits[CACHE - 1 : -1].float(), window[CACHE:], reduction="none").tolist()
    return nats


def main() -> None:
    before = environment()
    torch.set_num_threads(1)
    session = wb.Session(MODEL, kv_dtype="float32")
    ids = held_out_text(session, FIRST + TOKENS)
    session.read(ids[:FIRST])
    asked: dict[str, dict[str, Any]] = {
        "cache positions": {},
        "true positions": {"positions": "text"},
        "no sinks": {"sinks": 0},
    }
    found: dict[str, Streamed] = {}
    for name, parameters in asked.items():
        plan = session.plan("streaming-llm", budget=f"{CACHE} tokens", **parameters)
        count = TOKENS if not parameters else SHORT
        found[name] = stream(session, plan, ids[: FIRST + count], closed_up="positions" not in parameters)
        assert found[name].nbytes <= plan.nbytes
    found["whole cache"] = stream(session, session.plan("full"), ids[: FIRST + DENSE], closed_up=False)
    again = Streamed(recomputed(session, ids))
    streamed = found["cache positions"]
    assert all(math.isfinite(nats) for nats in streamed.nats)
    reference = again.stretches()
    excess = [got - want for got, want in zip(streamed.stretches(), reference, strict=False)]
    columns = ["read again", *found]
    rows = [again, *found.values()]
    table = [["tokens", *columns, "cache positions - read again"]]
    for index in range(TOKENS // STRETCH):
        cells = [f"{row.stretches()[index]:.3f}" if index < len(row.stretches()) else "" for row in rows]
        difference = f"{excess[index]:+.3f}" if index < len(excess) else ""
        table.append([f"{index * STRETCH:,} to {(index + 1) * STRETCH:,}", *cells, difference])
    begun = [["tokens", *found]]
    for start in range(0, DENSE, 2_000):
        cells = [f"{mean(row.nats[start : start + 2_000]):.3f}" for row in found.values()]
        begun.append([f"{start:,} to {start + 2_000:,}", *cells])
    bounds = [["", "tokens read", "true position of the last", "largest position attended to", "most bytes"]]
    bounds += [
        [name, f"{FIRST + len(row.nats):,}", f"{row.position - 1:,}", f"{row.furthest:,}", f"{row.nbytes:,}"]
        for name, row in found.items()
    ]
    figures = {
        "model": MODEL,
        "positions of the model": session.facts.max_positions,
        "cache": CACHE,
        "step": STEP,
        "stretch": STRETCH,
        "nats": {"read again": reference, **{name: row.stretches() for name, row in found.items()}},
        "nats in the beginning": {
            name: [mean(row.nats[start : start + 2_000]) for start in range(0, DENSE, 2_000)]
            for name, row in found.items()
        },
        "most bytes": {name: row.nbytes for name, row in found.items()},
        "largest position": {name: row.furthest for name, row in found.items()},
        "last token": {name: row.position - 1 for name, row in found.items()},
    }
    write("streaming", figures, table, before, begun, bounds)


if __name__ == "__main__":
    main()
