"""The command line: `workbench app | run | compare | sweep | sensitivity | export | methods | models | doctor`."""

from workbench.cli.entry import main

__all__ = ["main"]
