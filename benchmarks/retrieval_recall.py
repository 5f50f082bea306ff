"""How many of the keys that a query gives most are found, by the share of keys looked at: an index over keys against
one that the prompt's queries guide (default model, a needle text of 2,048 tokens, the question's own queries).

Needs `usearch`, the library whose HNSW graph over keys is the plain index.
"""

from __future__ import annotations

import math
from collections import defaultdict
from importlib.metadata import version
from statistics import mean

import numpy as np
import torch
from torch import Tensor
from usearch.index import Index as Hnsw

import workbench as wb
from benchmarks.record import environment, write
from workbench.budget import Budget
from workbench.examples import needle
from workbench.kv import RetrievalAttention
from workbench.kv.base import Study
from workbench.kv.stores.key_index import Keys
from workbench.trace import Trace

TOKENS, BUDGET = 2048, 0.1
LAYERS = range(1, 30, 4)
FIRST = (20, 100)  # k of recall@k: 1 % and 5 % of the prompt
WIDTHS = (20, 50, 100, 200, 400)  # of a search's beam

Points = dict[tuple[str, int, int], list[tuple[float, float]]]  # (index, k, width) -> (visited, recall) of each layer


def read(session: wb.Session, ids: Tensor) -> Trace:
    session.read(ids)
    assert session.trace is not None
    return session.trace


def recall(found: Tensor, exact: Tensor) -> float:
    """The share of exact [k, b, c] that is among found [k, b, f]."""
    return float((exact[..., None] == found[..., None, :]).any(dim=-1).float().mean())


def measure(points: Points, graphs: dict[str, Keys], query: Tensor) -> None:
    """Search one layer's graphs, and the library's, for query [k, b, d]."""
    keys = next(iter(graphs.values())).graph.keys
    heads, count, width = keys.shape
    exact = (query @ keys.transpose(1, 2)).topk(max(FIRST), dim=2).indices
    plain = [Hnsw(ndim=width, metric="ip", dtype="f32", connectivity=16, expansion_add=128) for _ in range(heads)]
    for head, index in enumerate(plain):
        index.add(np.arange(count), keys[head].numpy(), threads=1)
    for beam in WIDTHS:
        wanted = [k for k in FIRST if k <= beam]
        for name, retriever in graphs.items():
            found = retriever.graph.search(query, wanted[-1], beam)
            for k in wanted:
                visited = float(found.visited.float().mean()) / count
                points[name, k, beam].append((visited, recall(found.keys[..., :k], exact[..., :k])))
        for head, index in enumerate(plain):
            index.expansion_search = beam
            hits = index.search(query[head].numpy(), wanted[-1], threads=1)
            names, visited = torch.from_numpy(hits.keys.astype(np.int64)), hits.computed_distances / len(query[head])
            for k in wanted:
                hit = recall(names[None, :, :k], exact[head : head + 1, :, :k])
                points["hnsw over keys", k, beam].append((visited / count, hit))


def main() -> None:
    before = {**environment(), "usearch": version("usearch")}
    torch.set_num_threads(1)
    session = wb.Session("smollm2-135m")
    tokenizer = session.tokenizer
    assert tokenizer is not None
    text = needle(TOKENS, count=lambda words: len(tokenizer(words)["input_ids"]))
    ids = torch.tensor(tokenizer(text.text)["input_ids"])
    asked = torch.tensor(tokenizer(f"\n\nQuestion: {text.question}\nAnswer: The answer is {text.answer}.")["input_ids"])
    later = read(session, torch.cat([ids, asked])).layers
    trace = read(session, ids)
    methods = {
        "by the prompt's queries": RetrievalAttention(budget=Budget.parse(BUDGET)),
        "by keys": RetrievalAttention(budget=Budget.parse(BUDGET), guide="keys", guides=2048),
    }
    plan = session.plan(methods["by the prompt's queries"])
    points: Points = defaultdict(list)
    for number in LAYERS:
        layer, others = trace.layers[number], plan.tiers[number] == 2
        graphs = {}
        for name, method in methods.items():
            retriever = method.retrieve(Study(trace), ()).build(layer, others)
            assert isinstance(retriever, Keys)
            graphs[name] = retriever
        query = later[number].queries[:, len(ids) :].float()
        measure(points, graphs, query.reshape(layer.kv_heads, -1, query.shape[2]))
    found = {
        key: {"visited": mean(visited for visited, _ in at), "recall": mean(hits for _, hits in at)}
        for key, at in points.items()
    }
    figures = {
        "tokens": len(ids),
        "keys": int((plan.tiers[LAYERS[0], 0] == 2).sum()),
        "queries": len(asked),
        "layers": list(LAYERS),
        "points": [{"index": name, "k": k, "beam": beam, **at} for (name, k, beam), at in found.items()],
    }
    names = ["hnsw over keys", *reversed(methods)]
    table = [["k", "beam", *[f"{name}: recall (visited)" for name in names], "exact: recall (visited)"]]
    for k in FIRST:
        for beam in WIDTHS:
            row = [found.get((name, k, beam)) for name in names]
            cells = [f"{at['recall']:.3f} ({at['visited']:.1%})" for at in row if at is not None]
            if cells:
                table.append([str(k), str(beam), *cells, "1.000 (100.0%)"])
    assert all(math.isfinite(at["recall"]) for at in found.values())
    write("retrieval_recall", figures, table, before)


if __name__ == "__main__":
    main()
