"""How `workbench-tiny` was made: corpus, tasks, training, evaluation; `python -m workbench.models.training`."""

from workbench.models.training.architecture import new_model
from workbench.models.training.corpus import Corpus, build_corpus
from workbench.models.training.evaluate import evaluate
from workbench.models.training.train import train

__all__ = ["Corpus", "build_corpus", "evaluate", "new_model", "train"]
