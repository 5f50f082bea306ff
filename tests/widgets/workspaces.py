"""What tests of the app's workspaces share: a page without a thread of its own, and models that are loaded already."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from workbench.errors import ModelNotFound
from workbench.models import LoadedModel, facts
from workbench.progress import Progress
from workbench_widgets.app.work.loaded_models import LoadedModels


def now(show: Callable[[], None]) -> None:
    """A page whose own thread is whichever comes."""
    show()


class Ready(LoadedModels):
    """One model under every name but "missing"."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.loaded = LoadedModel(model, tokenizer, "tiny", facts(model))

    def get(self, name: str, progress: Progress) -> LoadedModel:
        if name == "missing":
            raise ModelNotFound("no model 'missing'")
        return self.loaded
