"""How far a sweep is, and which models it could not load."""

from __future__ import annotations

from workbench.errors import WorkbenchError
from workbench.progress import Progress
from workbench.sweep.grid import Grid, ModelSpec


class Tally:
    """How many rows of so many are there, told to a progress."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.done, self.total = 0, total
        self.tell(0)

    def tell(self, more: int = 1) -> None:
        """There are more rows. Raises Cancelled."""
        self.done += more
        self.progress.update("sweeping", self.done, self.total)


def check_loaded(grid: Grid, refused: dict[ModelSpec, WorkbenchError]) -> None:
    """Raise for the models that could not be loaded."""
    if not refused:
        return
    if len(grid.models) == 1:
        raise next(iter(refused.values()))
    told = "; ".join(f"{model.name}: {error}" for model, error in refused.items())
    raise WorkbenchError(f"{len(refused)} of {len(grid.models)} models could not be loaded: {told}")
