"""The app for `panel serve widgets/workbench_widgets/app/main.py`, as Binder starts it.

WORKBENCH_MODEL: what a page begins with. WORKBENCH_MODELS: what visitors may load besides that and the packaged models,
separated by commas; "*" stands for anything, for a server that only its own machine reaches. Which hosts it answers is
for `panel serve` to say (--allow-websocket-origin) and for the proxy in front of it.
"""

from __future__ import annotations

import os

import panel as pn

from workbench_widgets.app.page import page
from workbench_widgets.app.serve import DEFAULT_MODEL
from workbench_widgets.app.work.loaded_models import LoadedModels
from workbench_widgets.app.work.offered_models import OfferedModels

more = tuple(filter(None, map(str.strip, os.environ.get("WORKBENCH_MODELS", "").split(","))))
offered = OfferedModels(os.environ.get("WORKBENCH_MODEL", DEFAULT_MODEL), more, anything="*" in more)
# This file runs anew for every page; the server keeps the models.
page(offered, pn.state.as_cached("workbench models", LoadedModels)).servable()
