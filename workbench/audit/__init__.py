"""The audit of a model: what each layer is, and what becomes of it. Users find it as `workbench.models.audit`."""

from workbench.audit.audited import audited

__all__ = ["audited"]
