"""How `workbench-tiny` was made: corpus, tasks, training, evaluation; `python -m training`."""

from training.architecture import new_model
from training.corpus import Corpus, build_corpus
from training.evaluate import evaluate
from training.train import train

__all__ = ["Corpus", "build_corpus", "evaluate", "new_model", "train"]
