"""`python -m training corpus|train|evaluate`: how `workbench-tiny` is made, step by step."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from training.corpus import Corpus, build_corpus
from training.evaluate import evaluate
from training.train import train, write_report
from workbench.models import load


def main() -> None:
    """Learn the vocabulary, train, or evaluate, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    corpus = commands.add_parser("corpus", help="learn the vocabulary and write the token files")
    corpus.add_argument("--documentation", type=Path, required=True, help="sources of Python's documentation (.rst)")
    corpus.add_argument("--out", type=Path, required=True)
    training = commands.add_parser("train", help="train from nothing, save, evaluate")
    training.add_argument("--corpus", type=Path, required=True, help="what `corpus` wrote")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--minutes", type=float, default=7.0)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--workers", type=int, default=12, help="processes that make batches")
    training.add_argument("--batch-tokens", type=int, default=65_536)
    training.add_argument("--peak", type=float, default=3e-3, help="the highest learning rate")
    training.add_argument("--compile", action="store_true", help="compile the layers (pays on a GPU after a minute)")
    training.add_argument("--layers", type=int, default=8)
    training.add_argument("--width", type=int, default=256)
    training.add_argument("--tries", type=int, default=40, help="tasks for each figure of the evaluation; 0: none")
    judging = commands.add_parser("evaluate", help="measure a saved model again")
    judging.add_argument("--corpus", type=Path, required=True)
    judging.add_argument("--model", type=Path, required=True)
    judging.add_argument("--tries", type=int, default=40)
    given = parser.parse_args()

    if given.command == "corpus":
        built = build_corpus(given.documentation, given.out)
        print((built.folder / "corpus.json").read_text())
        return
    source = Corpus(given.corpus)
    if given.command == "evaluate":
        print(json.dumps(evaluate(load(given.model, dtype="float32").model, source, given.tries), indent=1))
        return
    report = {
        "training": train(
            source,
            given.out,
            given.minutes,
            seed=given.seed,
            batch_tokens=given.batch_tokens,
            peak=given.peak,
            workers=given.workers,
            compiled=given.compile,
            shape={"layers": given.layers, "width": given.width},
        )
    }
    write_report(report, given.out)
    if given.tries:
        began = time.monotonic()
        report["evaluation"] = evaluate(load(given.out, dtype="float32").model, source, given.tries)
        write_report(report, given.out)
        print(f"evaluated in {time.monotonic() - began:.0f} s")
        print(json.dumps(report["evaluation"]))


if __name__ == "__main__":
    main()
