"""Where the command line starts and ends: every outcome becomes an exit code and at most one line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

import typer

from workbench.errors import WorkbenchError

# Typer carries its own copy of click in newer releases: the classes are taken from where Typer has them.
_UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")
_CANCELLED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 the work failed, 2 the input was wrong, 130 cancelled.

    arguments: those after the program's name (default: the process's own). `--debug`, anywhere among them, shows the
    traceback of whatever goes wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = words[: words.index("--")] if "--" in words else words
    debug = "--debug" in options
    if debug:
        words.remove("--debug")
    with warnings.catch_warnings():
        if not debug and not sys.warnoptions:
            warnings.simplefilter("ignore")  # stderr is for progress and for one line that says what went wrong
        return _finished(words, debug)


def _finished(words: list[str], debug: bool) -> int:
    try:
        _invoke(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has seen enough (`workbench methods | head`); nothing is left to say at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return _say("cancelled", _CANCELLED)
    except typer.Exit as done:
        return done.exit_code
    except WorkbenchError as error:
        if debug:
            traceback.print_exc()
        return _say(str(error), error.exit_code)
    except _UsageError as error:
        return _say(error.format_message(), 2)  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001  whatever it is, users see one line, or its traceback on request
        if debug:
            traceback.print_exc()
        hint = "" if debug else "; run it again with --debug to see where"
        return _say(f"unexpected {type(error).__name__}: {error}{hint}", 1)
    return 0


def _invoke(arguments: list[str]) -> None:
    from workbench.cli.commands import app

    command = typer.main.get_command(app)
    with command.make_context("workbench", arguments) as context:
        command.invoke(context)


def _say(message: str, exit_code: int) -> int:
    print("workbench:", " ".join(message.split()), file=sys.stderr)
    return exit_code
