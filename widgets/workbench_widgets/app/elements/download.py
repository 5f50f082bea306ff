"""A button that gives a file: that of Panel gives one only where it differs from the last."""

from __future__ import annotations

import panel_material_ui as pmu


class Download(pmu.FileDownload):
    """Every press gives a file, the same one too."""

    _sent = 0

    def _sync_data(self, fileobj: object) -> None:
        before = self.data
        super()._sync_data(fileobj)
        if self.data == before:
            self.param.trigger("data")

    def _process_param_change(self, params: dict[str, object]) -> dict[str, object]:
        changed: dict[str, object] = super()._process_param_change(params)
        data = changed.get("data")
        if isinstance(data, str) and data:  # the browser acts on data that it has not seen
            self._sent += 1
            changed["data"] = data.replace(";", f";sent={self._sent};", 1)
        return changed
