"""The app's tabs, one a file: each shows one thing of a workspace, and computes it only while it is in view."""

from workbench_widgets.app.panels.attention import AttentionPanel
from workbench_widgets.app.panels.head_error import HeadErrorPanel
from workbench_widgets.app.panels.memory import MemoryPanel
from workbench_widgets.app.panels.outliers import OutliersPanel
from workbench_widgets.app.panels.panel import Panel
from workbench_widgets.app.panels.runs import RunsPanel
from workbench_widgets.app.panels.tokens import TokensPanel
from workbench_widgets.app.panels.weights import WeightsPanel

__all__ = [
    "AttentionPanel",
    "HeadErrorPanel",
    "MemoryPanel",
    "OutliersPanel",
    "Panel",
    "RunsPanel",
    "TokensPanel",
    "WeightsPanel",
]
