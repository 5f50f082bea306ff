"""JupyterLab with the served app behind its own address: .../workbench/ starts it on first use."""

import sys
from importlib.util import find_spec
from pathlib import Path

found = find_spec("workbench_widgets")
assert found is not None, "inference-workbench is not installed"
assert found.origin is not None
app = Path(found.origin).parent / "app" / "main.py"

c.ServerProxy.servers = {  # noqa: F821  (Jupyter gives `c`)
    "workbench": {
        "command": [
            *(sys.executable, "-m", "panel", "serve", str(app)),
            *("--port", "{port}", "--address", "127.0.0.1", "--allow-websocket-origin", "*"),
            *("--prefix", "{base_url}workbench", "--use-xheaders", "--num-threads", "4"),
        ],
        "absolute_url": True,  # the app is told its prefix
        "timeout": 60,  # a cold start imports torch: 20 s on a busy Binder
        "launcher_entry": {"title": "Inference workbench"},
    }
}
c.LabApp.default_url = "/lab/tree/notebooks/01_first_look.ipynb"  # noqa: F821
c.ServerApp.jpserver_extensions = {"workbench_widgets.saving": True}  # noqa: F821
