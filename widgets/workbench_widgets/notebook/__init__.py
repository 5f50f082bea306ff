"""What a plan, a run or a session shows in a notebook, and the attention of a prompt: views put together and linked."""

from workbench_widgets.html_summaries import plan_html, results_html, run_html, runs_html, session_html
from workbench_widgets.notebook.attention_view import AttentionView
from workbench_widgets.notebook.bundles import PLOTLY, figure, memory_figure, view, views
from workbench_widgets.notebook.plan_view import PlanView
from workbench_widgets.notebook.run_view import RunView

__all__ = [
    "PLOTLY",
    "AttentionView",
    "PlanView",
    "RunView",
    "figure",
    "memory_figure",
    "plan_html",
    "results_html",
    "run_html",
    "runs_html",
    "session_html",
    "view",
    "views",
]
