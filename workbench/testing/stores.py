"""What a plan's stores have to hold."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workbench.kv.plan import Plan
from workbench.kv.stores import Store
from workbench.measure.memory import tensor_bytes
from workbench.testing.problem import must


def live_nbytes(stores: Iterable[Store]) -> int:
    """Bytes of all tensors that can be reached from the stores, found without asking them."""
    tensors: list[Tensor] = []
    seen: dict[int, object] = {}  # kept, so that no number is given again

    def visit(thing: object) -> None:
        if id(thing) in seen or isinstance(thing, nn.Module | type):
            return
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            tensors.append(thing)
        elif isinstance(thing, list | tuple | set):
            for item in thing:
                visit(item)
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(list(stores))
    return tensor_bytes(tensors)


def check_plan(plan: Plan) -> list[Store]:
    """Check that a plan's stores hold exactly the bytes and the positions that it says; returns them."""
    stores, tokens = plan.stores(), plan.trace.tokens
    said, host, live = sum(s.nbytes for s in stores), sum(s.host_nbytes for s in stores), live_nbytes(stores)
    must(said == plan.nbytes, f"{plan.nbytes} bytes are planned, the stores count {said}")
    must(host == plan.host_nbytes, f"{plan.host_nbytes} bytes are planned for host memory, the stores count {host}")
    must(live == said + host, f"the stores count {said + host} bytes, their tensors hold {live}")
    must(int(plan.counts.min()) >= 1, "a head keeps nothing")
    for layer, store in enumerate(stores):
        heads = plan.trace.layers[layer].kv_heads
        must(len(store.positions) == heads, f"layer {layer} stores {len(store.positions)} KV heads of {heads}")
        for head, positions in enumerate(store.positions):
            kept, where = plan.kept(layer, head), f"layer {layer}, KV head {head}"
            must(torch.equal(positions.cpu(), kept), f"{where}: kept are {kept.tolist()}, stored {positions.tolist()}")
            must(
                ascending(positions, tokens), f"{where}: {positions.tolist()} are no ascending positions below {tokens}"
            )
    must(bool(plan.error.isfinite().all()), "the attention over what is kept is not finite")
    return stores


def ascending(positions: Tensor, end: int) -> bool:
    """Whether these are positions [m] int64 from 0 to `end` - 1, each after the one before."""
    inside = positions.numel() == 0 or (int(positions[0]) >= 0 and int(positions[-1]) < end)
    return positions.dtype == torch.int64 and inside and bool((positions.diff() > 0).all())
