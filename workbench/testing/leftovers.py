"""Whether a use of a method leaves anything behind: on itself, the model, the recording, or in modules."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.registry import Method
from workbench.testing.module_state import changed, module_state
from workbench.testing.problem import must
from workbench.trace import Trace


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of every bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def recorded_in(trace: Trace) -> Iterator[Tensor]:
    """Every tensor of a recording."""
    for layer in trace.layers:
        yield from (layer.keys_held, layer.values_held, layer.queries_held)
    yield from (trace.logits, trace.ids)


def _state_of(model: nn.Module) -> dict[str, Any]:
    """Everything a method could leave on a model: tensors, attributes, hooks, switches."""
    modules = dict(model.named_modules())
    return {
        "tensors": fingerprint([*model.parameters(), *model.buffers()]),
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {
            name: [len(hooks) for key, hooks in vars(module).items() if key.endswith("hooks")]
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "config": repr(getattr(model, "config", None)),
    }


def _state_of_method(method: Method) -> object:
    containers = {
        name: value
        for name, value in vars(type(method)).items()
        if isinstance(value, dict | list | set) and not name.startswith("_")
    }
    return copy.deepcopy((vars(method), method.__pydantic_private__, containers))


@contextmanager
def nothing_left(method: Method, model: nn.Module, recorded: Iterable[Tensor] = ()) -> Iterator[None]:
    """Check that the block leaves the method, the model, the recording, the random state and what modules hold as they
    were: those of the workbench, of its kernels and of the method's own package.
    """
    recorded = list(recorded)
    of_method, of_model, of_trace = _state_of_method(method), _state_of(model), fingerprint(recorded)
    packages = ("workbench", "workbench_kernels", type(method).__module__.split(".", 1)[0])
    random, of_modules = torch.get_rng_state(), module_state(packages)
    yield
    for what, state in _state_of(model).items():
        must(state == of_model[what], f"the model's {what} changed")
    must(fingerprint(recorded) == of_trace, "the trace changed")
    must(_state_of_method(method) == of_method, "the method remembers something between uses")
    must(torch.equal(torch.get_rng_state(), random), "the global random state changed; draw from a seeded generator")
    names = changed(of_modules, module_state(packages))
    must(not names, f"modules remember something between uses: {', '.join(names)}")
