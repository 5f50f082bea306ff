"""What running a model would cost: memory, times and how many sequences fit, from its config alone.

`wb.cost("Qwen/Qwen3-8B", "kivi", hardware="H100", context=32768)` estimates; `catalogue()` lists the devices.
"""

from workbench.callable_package import callable_as
from workbench.cost.estimate import Cost
from workbench.cost.estimating import cost
from workbench.cost.hardware import Figure, Hardware, catalogue, hardware
from workbench.cost.memory import Memory
from workbench.cost.times import Term

__all__ = ["Cost", "Figure", "Hardware", "Memory", "Term", "catalogue", "cost", "hardware"]

callable_as(__name__, cost)
