"""What a page says when its server is gone: browsers show a dead page as if it were alive.

A page that was cut off stays as it is and is not connected again, for Bokeh 3.9 cannot take one up in which there is
binary data, or for which there is news: it would look alive and miss what happened meanwhile. Its address holds its
state, so reloading brings it back.
"""

from __future__ import annotations

from bokeh.document import Document
from bokeh.models import CustomJS

GONE = "The server has gone; what is on the page stays, nothing more can be computed. Reload when it is back."

_NOTICE_SCRIPT = """
if (document.getElementById("wb-gone")) return
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


def tell_when_gone(doc: Document) -> None:
    """Show the notice in the page of this document when its connection is lost."""
    doc.js_on_event("connection_lost", CustomJS(code=_NOTICE_SCRIPT, args={"text": GONE}))
