"""Options that several commands take: each a type of its own, those that go together a bundle.

A command that takes a bundle as a parameter, under `bundled`, has an option for each of its fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from workbench.cli import inputs

if TYPE_CHECKING:
    from workbench.cli.terminal import Bar
    from workbench.session import Session

DEFAULT_MODEL = "smollm2-135m"

Methods = Annotated[
    list[str],
    typer.Argument(metavar="METHOD...", help='keys from `workbench methods`; "snapkv+kivi" is one recipe of two'),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="a method's parameter, as window=16 or snapkv.window=16; preset=paper: published ones",
    ),
]
Budget = Annotated[str | None, typer.Option("--budget", help='share or size: 0.25, 25%, 64MiB, "512 tokens"')]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="what weight methods look at: workbench, python, sampled, or a file")
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output")]
KVDtype = Annotated[str | None, typer.Option("--kv-dtype", help="how caches are stored: float32, bfloat16, float16")]
TaskChat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="wrap texts in the model's chat template (default: as the task has it)"),
]
TaskReply = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="the longest reply (default: as the task has it)")
]
Model = Annotated[str, typer.Option("--model", help="catalogue name, hub id, folder, or .gguf file")]


@dataclass(frozen=True)
class PromptOptions:
    """What is read, and what is asked after it."""

    text: Annotated[str | None, typer.Option("--text", help="the text to read ('-': standard input)")] = None
    text_file: Annotated[str | None, typer.Option("--text-file", help="a file with the text ('-': standard input)")] = (
        None
    )
    example: Annotated[
        str | None, typer.Option("--example", help="a ready text with a question: needle, code, dialogue")
    ] = None
    question: Annotated[
        str | None, typer.Option("--question", help="what to ask after the text (else: go on from it)")
    ] = None
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="a file that the model sees, where the text says <image>, else before it; repeat"),
    ] = None
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="wrap the text in the model's chat template (default: if it has one)"),
    ] = None

    def read(self) -> tuple[str, str | None]:
        """The text, and the question: an example's own where no other was typed. Raises BadPrompt."""
        text, question = inputs.prompt(self.text, self.text_file, self.example)
        return text, inputs.question(self.question, question)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where and in what it computes."""

    model: Model = DEFAULT_MODEL
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="what the model computes in: float32, bfloat16, float16")
    ] = None
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    ] = None

    device_map: Annotated[
        str | None, typer.Option("--device-map", help="spread the layers over devices: auto, balanced, sequential")
    ] = None

    def session(self, bar: Bar, cache: CacheOptions | None = None) -> Session:
        """A session with the model, loaded under the bar."""
        from workbench.session import Session

        cache = cache or CacheOptions()
        return Session(
            self.model,
            device=self.device,
            dtype=self.dtype,
            device_map=self.device_map,
            kv_dtype=cache.kv_dtype,
            seed=cache.seed,
            progress=bar.progress,
        )


@dataclass(frozen=True)
class CacheOptions:
    """How caches are held and answers made."""

    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="the longest answer, in tokens")] = 32
    kv_dtype: KVDtype = None
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="for methods that draw at random")] = 0


def bundled(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose parameters that are bundles are shown as their fields, each an option, in the same places."""
    parameters = signature(command, eval_str=True).parameters.values()
    bundles: dict[str, type[Any]] = {
        each.name: each.annotation
        for each in parameters
        if isinstance(each.annotation, type) and is_dataclass(each.annotation)
    }

    @wraps(command)
    def run(**values: Any) -> None:
        made = {
            name: bundle(**{field.name: values.pop(field.name) for field in fields(bundle)})
            for name, bundle in bundles.items()
        }
        command(**values, **made)

    options = [option for each in parameters for option in _options(each)]
    shown: Any = run  # what Typer reads
    shown.__signature__ = signature(command).replace(parameters=options)
    shown.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _options(parameter: Parameter) -> Iterator[Parameter]:
    """The parameter itself, or one for each field of a bundle."""
    bundle = parameter.annotation
    if not is_dataclass(bundle):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    hints = get_type_hints(bundle, include_extras=True)
    for field in fields(bundle):
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name])
