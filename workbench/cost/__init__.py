"""What running a model would cost: memory, times and how many sequences fit, from its config alone.

`wb.cost("Qwen/Qwen3-8B", "kivi", hardware="H100", context=32768)` estimates; `catalogue()` lists the devices.
`system("splitwise")` runs a system from the literature as a model, `systems()` lists them; `workbench.cost.serving` is
the simulator below them.
"""

from workbench.callable_package import callable_as
from workbench.cost.estimate import Cost
from workbench.cost.estimating import cost
from workbench.cost.hardware import Figure, Hardware, catalogue, hardware
from workbench.cost.literature import system, systems
from workbench.cost.memory import Memory
from workbench.cost.targets import targets
from workbench.cost.times import Term

__all__ = [
    "Cost",
    "Figure",
    "Hardware",
    "Memory",
    "Term",
    "catalogue",
    "cost",
    "hardware",
    "system",
    "systems",
    "targets",
]

callable_as(__name__, cost)
