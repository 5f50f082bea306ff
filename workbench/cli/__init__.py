"""The command line: `workbench run | compare | evaluate | sweep | results | export | app | ...`; `--help` lists all."""

from workbench.cli.entry import main

__all__ = ["main"]
