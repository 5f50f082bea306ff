"""The browser's address and its history: what slides replaces the entry, what is chosen makes a new one, Back tells."""

from __future__ import annotations

import param
from panel.custom import AnyWidgetComponent

_ESM = """
export default {
  render({ model }) {
    model.on("change:written", () => {
      const [how, query] = JSON.parse(model.get("written"));
      if (query === location.search) return;
      history[how === "push" ? "pushState" : "replaceState"](null, "", location.pathname + query + location.hash);
    });
    const back = () => {
      model.set("popped", JSON.stringify([performance.now(), location.search]));
      model.save_changes();
    };
    addEventListener("popstate", back);
    return () => removeEventListener("popstate", back);
  },
};
"""


class History(AnyWidgetComponent):
    """written: ["push" or "replace", query] as JSON.

    popped: [a number that differs, query], when a person went back.
    """

    written = param.String(default='["replace", ""]')
    popped = param.String(default="")

    _esm = _ESM
