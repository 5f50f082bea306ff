"""What a page says when its server is gone: browsers show a dead page as if it were alive."""

from __future__ import annotations

from typing import Any

from bokeh.models import CustomJS

GONE = "The server has gone; what is on the page stays, nothing more can be computed. Reload when it is back."

# Bokeh tries to connect again, first at once. Only when that fails is there something to tell.
_LOST = """
if (cb_obj.timeout === 0 || document.getElementById("wb-gone")) return
const said = document.createElement("div")
said.id = "wb-gone"
said.setAttribute("role", "alert")
said.textContent = text
Object.assign(said.style, {
  position: "fixed", bottom: "0", left: "0", right: "0", zIndex: "10000", padding: "12px 16px", textAlign: "center",
  font: "600 14px/1.4 system-ui, sans-serif", color: "#fff", background: "#a4262c",
})
document.body.append(said)
"""
_BACK = """document.getElementById("wb-gone")?.remove()"""


def tell_when_gone(doc: Any) -> None:
    """Show the notice in the page of this document when its connection is lost, until it is back."""
    doc.js_on_event("connection_lost", CustomJS(code=_LOST, args={"text": GONE}))
    doc.js_on_event("client_reconnected", CustomJS(code=_BACK))
