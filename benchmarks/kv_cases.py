"""What the KV methods are asked: which tasks of the workbench, at which lengths and depths, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from workbench.examples import examples
from workbench.tasks import Case, Encode, Task, task

DEPTHS = (0.1, 0.5, 0.9)
ASKED_LATER = ("needle", "multi-key", "variables")  # the question comes after compression
ASKED_FIRST = "asked first"  # a needle whose question ends the text that is compressed
HELD = "held text"
TASKS = (*ASKED_LATER, ASKED_FIRST, HELD)
HELD_TOKENS = 64  # how much of a held text is predicted


@dataclass(frozen=True)
class Spec:
    """One case, from which `build` makes the same text every time. depth: of the needle. draw: which of many alike."""

    task: str
    length: int
    depth: float | None = None
    draw: int = 0

    @property
    def key(self) -> str:
        depth = "" if self.depth is None else f"/{self.depth:g}"
        return f"{self.task}/{self.length}{depth}/{self.draw}"

    def of_workbench(self) -> Task:
        """The workbench's task that makes this case."""
        shared = {"length": self.length, "seed": self.draw}
        if self.task in ("needle", ASKED_FIRST):
            asked = "first" if self.task == ASKED_FIRST else "after"
            return task("needle", depth=self.depth, asked=asked, **shared)
        if self.task == HELD:
            return task("perplexity", predicted=HELD_TOKENS, **shared)
        return task("chain" if self.task == "variables" else self.task, **shared)


def specs(tasks: Sequence[str], lengths: Sequence[int], draws: int) -> list[Spec]:
    """All cases, in an order in which every beginning is balanced: draw by draw, and in each the short texts first."""
    found = []
    for draw in range(draws):
        for length in lengths:
            for name in tasks:
                if name in ("needle", ASKED_FIRST):
                    found += [Spec(name, length, depth, draw) for depth in DEPTHS]
                elif name != HELD or (length <= 1024 and draw < len(examples())):  # no ready text is longer
                    found.append(Spec(name, length, None, draw))
    return found


def build(spec: Spec, encode: Encode) -> Case:
    """The case, made with the token ids that texts have."""
    return spec.of_workbench().case(encode)
