"""What attention operators promise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workbench.attention.operators.base import Operator, per_head
from workbench.errors import BadBudget
from workbench.testing.leftovers import nothing_left
from workbench.testing.problem import MethodProblem, must
from workbench.testing.subjects import TOKENS, Subjects

_CLOSE = 1e-4  # of the norm: what float32 may lose on the way

Heads = tuple[Tensor, Tensor, Tensor]
_SCALE = 0.3


def _drawn(tokens: int, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> Heads:
    """Random queries [h, n, 8], keys [k, n, 8] and values [k, n, 6]."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    query, key, value = (
        torch.randn(shape, generator=generator)
        for shape in ((heads, tokens, 8), (kv_heads, tokens, 8), (kv_heads, tokens, 6))
    )
    return query, key, value


def _agree(got: Tensor, want: Tensor, broken: str, tolerance: float = _CLOSE) -> None:
    """Check that two tensors are equal up to a share of the second one's norm."""
    same = got.shape == want.shape
    must(same, f"{broken}: the shapes are {list(got.shape)} and {list(want.shape)}")
    apart = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    must(apart <= tolerance, f"{broken}: they differ by {apart:.1e} of the norm")


def chunks_give_what_the_whole_map_gives(operator: Operator, subjects: Subjects) -> None:
    for tokens, heads, kv_heads in ((1, 2, 1), (2, 2, 2), (33, 4, 2), (TOKENS, 6, 2)):
        q, k, v = _drawn(tokens, heads, kv_heads)
        want = operator.plain(q, k, v, _SCALE)
        implied = operator.weights(q, k, _SCALE) @ per_head(v, heads)
        _agree(want, implied, f"{tokens} tokens: the output is not what the implied map makes of the values")
        for chunk in (1, 7, 16, tokens):
            got = type(operator)(**{**dict(operator), "chunk": chunk}).apply(q, k, v, _SCALE)
            _agree(got, want, f"{tokens} tokens: chunks of {chunk} give another output than the whole map")


def rows_are_those_of_the_whole_map(operator: Operator, subjects: Subjects) -> None:
    q, k, _ = _drawn(60)
    whole = operator.weights(q, k, _SCALE)
    must(whole.shape == (4, 60, 60) and whole.dtype == torch.float32, f"the map is {whole.dtype} {list(whole.shape)}")
    for first, stop in ((0, 1), (0, 60), (7, 8), (20, 45), (59, 60)):
        got = operator.rows(q, k, _SCALE, first, stop)
        _agree(got, whole[:, first:stop, :stop], f"rows {first} to {stop} are not those of the whole map")


def what_follows_changes_no_output_before(operator: Operator, subjects: Subjects) -> None:
    tensors = _drawn(64)
    before, weights = operator.apply(*tensors, _SCALE), operator.weights(*tensors[:2], _SCALE)
    must(not bool(weights.triu(1).any()), "a query gives weight to a token after it")
    for at in (1, 16, 40):
        q, k, v = (torch.cat([x[:, :at], 5 * y[:, at:]], 1) for x, y in zip(tensors, _drawn(64, seed=9), strict=True))
        broken = f"what comes after position {at - 1} changes what was before it"
        _agree(operator.apply(q, k, v, _SCALE)[:, :at], before[:, :at], broken, 1e-5)
        _agree(operator.weights(q, k, _SCALE)[:, :at], weights[:, :at], broken, 1e-5)
        q, k, v = (x[:, :at] for x in tensors)
        _agree(operator.apply(q, k, v, _SCALE), before[:, :at], f"how much comes after {at - 1} changes it", 1e-5)


def outputs_have_the_shape_and_precision_of_the_queries(operator: Operator, subjects: Subjects) -> None:
    exact = operator.apply(*_drawn(30), _SCALE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in _drawn(30))
        for got in (operator.apply(q, k, v, _SCALE), operator.plain(q, k, v, _SCALE)):
            right = got.dtype == dtype and got.shape == (4, 30, 6)
            must(right, f"queries {dtype} [4, 30, 8] and values of 6 give {got.dtype} {list(got.shape)}")
        same = operator.apply(q.float(), k.float(), v.float(), _SCALE)
        _agree(operator.apply(q, k, v, _SCALE), same, f"{dtype}: it is not computed in float32 or better", 1e-2)
    must(bool(exact.isfinite().all()), "the output is not finite")


def large_inputs_give_finite_outputs(operator: Operator, subjects: Subjects) -> None:
    for size in (1e-4, 1e2, 1e4):
        q, k, v = _drawn(40)
        must(bool(operator.apply(size * q, size * k, v, _SCALE).isfinite().all()), f"inputs of {size} overflow")
        must(bool(operator.weights(size * q, size * k, _SCALE).isfinite().all()), f"the map of inputs of {size} does")
    layer = subjects.reading().trace.layers[1]
    out = operator.apply(layer.queries, layer.keys, layer.values, layer.scale)
    must(bool(out.isfinite().all()), "what a model recorded gives an output that is not finite")


def each_head_is_by_itself(operator: Operator, subjects: Subjects) -> None:
    for heads, kv_heads in ((6, 2), (4, 1), (3, 3)):
        q, k, v = _drawn(40, heads, kv_heads)
        whole, group = operator.apply(q, k, v, _SCALE), heads // kv_heads
        repeated = operator.apply(q, per_head(k, heads), per_head(v, heads), _SCALE)
        _agree(
            repeated, whole, "heads of a group that share a KV head give another output than each with its own", 1e-5
        )
        for head in range(heads):
            kv = slice(head // group, head // group + 1)
            alone = operator.for_head(head, heads).apply(q[head : head + 1], k[kv], v[kv], _SCALE)
            _agree(
                alone[0], whole[head], f"head {head} of {heads} alone gives another output than among the others", 1e-5
            )


def the_same_inputs_give_the_same_output(operator: Operator, subjects: Subjects) -> None:
    tensors = _drawn(50)
    with nothing_left(operator, nn.Module(), tensors):
        one, _ = operator.apply(*tensors, _SCALE), operator.weights(*tensors[:2], _SCALE)
        operator.apply(*_drawn(31, seed=3), _SCALE)
    two = type(operator)(**dict(operator)).apply(*tensors, _SCALE)
    must(torch.equal(one, two), "the same queries, keys and values give another output the second time")


def an_operator_takes_no_budget(operator: Operator, subjects: Subjects) -> None:
    try:
        operator.with_budget(0.5)
    except BadBudget:
        return
    raise MethodProblem("it is never run in a model, so there is nothing to budget, but it takes a budget")
