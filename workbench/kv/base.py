"""What a KV method is written with: its base, what it may look at, and how the stages of a recipe are found."""

from workbench.kv.method import STAGES, Holding, KVMethod, Study, TeacherForcing, keep_first, keep_last
from workbench.kv.stages import Stages

__all__ = ["STAGES", "Holding", "KVMethod", "Stages", "Study", "TeacherForcing", "keep_first", "keep_last"]
