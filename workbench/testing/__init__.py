"""What every method promises, as checks that anyone's test-suite can call: `check_method(MyMethod)`.

Everything runs on tiny random models made here, in a second or two, without a network and without pytest. A promise
is a function of a method, named after what it promises; `PROMISES` lists them by family.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from workbench.attention.base import AttentionMethod
from workbench.attention.operators.base import Operator, per_head
from workbench.errors import BadBudget, BadParameter, BudgetTooSmall, NotApplicable
from workbench.kv.base import KVMethod, Study
from workbench.kv.plan import Plan, rank
from workbench.kv.stores import Store
from workbench.measure.memory import tensor_bytes
from workbench.models import facts, tiny
from workbench.prompt import Prompt
from workbench.registry import Method
from workbench.registry import method as make
from workbench.runtime.decode import Decoder
from workbench.runtime.planning import make_plan, study_of
from workbench.runtime.prefill import read
from workbench.runtime.run import Run
from workbench.session import Session
from workbench.trace import Trace
from workbench.weights.base import WeightMethod
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.compress import SHORT, compressed
from workbench.weights.survey import Survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BUDGETS = (0.1, 0.25, 0.5, 0.75, 1.0)
TOKENS = 70  # of the usual prompt: longer than a tiny model's sliding window (16), short enough for plain loops
_ROOM = 0.9  # for methods that read in pieces of their room: with a tenth of it, a short prompt takes 100 passes
_CLOSE = 1e-4  # of the largest logit: what float32 may lose on the way


class MethodProblem(AssertionError):
    """A promise that a method breaks: its key, the promise, and what was seen."""


def check_method(method: type[Method], **parameters: Any) -> None:
    """Check that a method keeps every promise of its family. Raises MethodProblem for the first that it breaks.

    method: a KV, weight or attention method, or an operator; it need not be registered. parameters: for all instances
    made of it, for instance a window that suits the short prompts used here (at most 70 tokens); no budget, for the
    checks set it.
    KV methods: the promises hold at every budget, so leave parameters that fix the bytes (a number of bits) at
    their defaults.
    """
    if "budget" in parameters:
        raise TypeError("check_method sets budgets itself: leave `budget` out")
    for promise in promises(method):
        check_promise(promise, method, **parameters)


Promise = Callable[[Any], None]
M = TypeVar("M", bound=Method)


def promises(method: type[Method]) -> tuple[Promise, ...]:
    """The promises of a method's family. Raises MethodProblem if it has none."""
    for base, kept in PROMISES.items():
        if issubclass(method, base):
            return kept
    bases = ", ".join(base.__name__ for base in PROMISES)
    raise MethodProblem(f"{method.__name__}: a method derives from one of {bases}")


def check_promise(promise: Promise, method: type[Method], **parameters: Any) -> None:
    """Check one promise. Raises MethodProblem, whatever goes wrong in the method."""
    name = f"{method.key or method.__name__}: {promise.__name__.replace('_', ' ')}"
    try:
        promise(method(**parameters))
    except MethodProblem as broken:
        reading.cache_clear()  # whatever the method did to them, the next one is checked on sound readings
        raise MethodProblem(f"{name}: {broken}") from broken.__cause__
    except Exception as error:
        reading.cache_clear()
        raise MethodProblem(f"{name}: {type(error).__name__}: {error}") from error


def _must(kept: bool | Tensor, broken: str) -> None:
    if not kept:
        raise MethodProblem(broken)


# -- what the promises are checked on


class Reading(NamedTuple):
    """A tiny model and what it recorded of a prompt."""

    model: PreTrainedModel
    trace: Trace


def fresh_reading(architecture: str = "llama", tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> Reading:
    """A prompt of random tokens, the same for each length, read by a tiny model."""
    model = tiny(architecture)
    nn.Module.to(model, dtype)
    return Reading(model, read(model, facts(model), Prompt(_ids(tokens), chat=False)))


reading = cache(fresh_reading)


def _ids(tokens: int, seed: int | None = None) -> Tensor:
    return torch.randint(0, 256, (tokens,), generator=torch.Generator().manual_seed(seed or tokens))


def plan_on(found: Reading, method: KVMethod, budget: Any = None, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The method's plan, by its own budget where none is given or it takes none; a method that reads gets more room."""
    if budget is None:
        asked = feasible(found, method.with_budget(_ROOM) if method.supplies("read") else method, dtype)
    else:
        asked = method.with_budget(budget) if _takes_budget(method) else method
    return make_plan(found.trace, [asked], dtype, model=found.model)


def feasible(found: Reading, method: M, dtype: torch.dtype = torch.bfloat16) -> M:
    """The method, with the smallest budget in place of its own where this prompt is too short for that."""
    try:
        make_plan(found.trace, [cast(KVMethod, method)], dtype, model=found.model)
    except BudgetTooSmall as refusal:
        return method.with_budget(refusal.smallest)
    return method


def _takes_budget(method: Method) -> bool:
    """Whether there is anything to budget: the full cache, for instance, is always whole."""
    try:
        method.with_budget(0.5)
    except BadParameter:
        return False
    return True


def within(found: Reading, method: KVMethod, budget: float, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """The plan at this budget, or at the smallest one that the refusal names, which has to work."""
    try:
        plan = plan_on(found, method, budget, dtype)
    except BudgetTooSmall as refusal:
        smallest = refusal.smallest
        _must(budget < smallest <= 1, f"the budget {budget} is refused, and {smallest} named as the smallest")
        try:
            plan = plan_on(found, method, smallest, dtype)
        except BudgetTooSmall as again:
            raise MethodProblem(f"the budget {smallest}, named as the smallest, is refused too: {again}") from again
        budget = smallest
    if not _takes_budget(method):
        budget = 1.0
    taken = f"{plan.nbytes} of {plan.full_nbytes} bytes"
    _must(plan.nbytes <= budget * plan.full_nbytes, f"a budget of {budget} is planned to take {taken}")
    return plan


def live_nbytes(stores: Iterable[Store]) -> int:
    """Bytes of all tensors that can be reached from the stores, found without asking them."""
    found: list[Tensor] = []
    seen: dict[int, Any] = {}  # held, so that no number is given again

    def visit(thing: Any) -> None:
        if id(thing) in seen or isinstance(thing, nn.Module | type):
            return
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, list | tuple | set):
            for item in thing:
                visit(item)
        elif isinstance(thing, dict):
            visit(list(thing.values()))
        elif hasattr(thing, "__dict__"):
            visit(vars(thing))

    visit(list(stores))
    return tensor_bytes(found)


def check_plan(plan: Plan) -> list[Store]:
    """Check that a plan's stores hold exactly the bytes and the positions that it says; returns them."""
    stores, tokens = plan.stores(), plan.trace.tokens
    said, host, live = sum(s.nbytes for s in stores), sum(s.host_nbytes for s in stores), live_nbytes(stores)
    _must(said == plan.nbytes, f"{plan.nbytes} bytes are planned, the stores count {said}")
    _must(host == plan.host_nbytes, f"{plan.host_nbytes} bytes are planned for host memory, the stores count {host}")
    _must(live == said + host, f"the stores count {said + host} bytes, their tensors hold {live}")
    _must(int(plan.counts.min()) >= 1, "a head keeps nothing")
    for layer, store in enumerate(stores):
        _must(len(store.positions) == plan.tiers.shape[1], f"layer {layer} stores {len(store.positions)} KV heads")
        for head, held in enumerate(store.positions):
            kept, where = plan.kept(layer, head), f"layer {layer}, KV head {head}"
            _must(torch.equal(held.cpu(), kept), f"{where}: kept are {kept.tolist()}, stored {held.tolist()}")
            _must(_ascending(held, tokens), f"{where}: {held.tolist()} are no ascending positions below {tokens}")
    _must(bool(plan.error.isfinite().all()), "the attention over what is kept is not finite")
    return stores


def _ascending(positions: Tensor, end: int) -> bool:
    inside = positions.numel() == 0 or (int(positions[0]) >= 0 and int(positions[-1]) < end)
    return positions.dtype == torch.int64 and inside and bool((positions.diff() > 0).all())


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A hash of every bit."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _recorded(trace: Trace) -> Iterator[Tensor]:
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
            name: [len(held) for key, held in vars(module).items() if key.endswith("hooks")]
            for name, module in modules.items()
        },
        "training": {name: module.training for name, module in modules.items()},
        "gradients": [parameter.requires_grad for parameter in model.parameters()],
        "config": repr(getattr(model, "config", None)),
    }


def _state_of_method(method: Method) -> Any:
    own = {name: value for name, value in vars(type(method)).items() if isinstance(value, dict | list | set)}
    plain = {name: value for name, value in own.items() if not name.startswith("_")}
    return copy.deepcopy((vars(method), method.__pydantic_private__, plain))


@contextmanager
def _nothing_left(method: Method, model: nn.Module, recorded: Iterable[Tensor] = ()) -> Iterator[None]:
    """Check that the block leaves the method, the model, the recording and the random state as they were."""
    recorded = list(recorded)
    of_method, of_model, of_trace = _state_of_method(method), _state_of(model), fingerprint(recorded)
    random = torch.get_rng_state()
    yield
    for what, state in _state_of(model).items():
        _must(state == of_model[what], f"the model's {what} changed")
    _must(fingerprint(recorded) == of_trace, "the trace changed")
    _must(_state_of_method(method) == of_method, "the method remembers something between uses")
    _must(torch.equal(torch.get_rng_state(), random), "the global random state changed; draw from a seeded generator")


# -- every method


def describes_itself(method: Method) -> None:
    """Key, title, claim, one sentence, and for each parameter a default within its bounds and a line of help."""
    for name in ("key", "title", "claim"):
        _must(bool(getattr(method, name)), f"it needs a {name}")
    _must(bool(type(method).summary()), "it needs a docstring whose first line says what it does")
    _must(type(method).parameter_key is Method.parameter_key, "results are cached by parameter_key: leave it alone")
    for parameter in type(method).parameters():
        _must(bool(parameter.help), f"the parameter {parameter.name} needs help=")
        if parameter.kind in ("int", "float"):
            _must(
                parameter.low is not None and parameter.high is not None,
                f"the parameter {parameter.name} needs bounds (ge=, le=): its control is a slider",
            )
    values = method.to_dict()
    _must(values.pop("method") == method.key, "to_dict does not name it by its key")
    twin = type(method)(**values)
    _must(twin == method and hash(twin) == hash(method), "what to_dict wrote does not read back as the same")


# -- KV methods


def live_bytes_are_those_planned_and_within_the_budget(method: KVMethod) -> None:
    for budget in BUDGETS[2:] if method.supplies("read") else BUDGETS:
        found = reading()
        plan = within(found, method, budget)
        check_plan(plan)
        layers = found.trace.layers
        full = sum(layer.kv_heads * TOKENS * (layer.keys.shape[-1] + layer.values.shape[-1]) * 2 for layer in layers)
        _must(plan.full_nbytes == full, f"the uncompressed cache is {full} bytes, not {plan.full_nbytes}")


def a_refusal_names_the_smallest_budget_that_works(method: KVMethod) -> None:
    if not _takes_budget(method):
        return
    for architecture in ("llama", "mqa", "gemma3"):
        found = reading(architecture, 33)
        try:
            plan_on(found, method, 0.001)
        except BudgetTooSmall as refusal:
            smallest = refusal.smallest
        else:
            raise MethodProblem("a thousandth of 33 tokens is less than one token, but was not refused")
        within(found, method, 0.001)
        try:
            less = plan_on(found, method, round(smallest - 0.0002, 4))
        except BudgetTooSmall:
            continue
        raise MethodProblem(f"{smallest} is named as the smallest budget, but {less.share:.4f} works too")


def a_whole_budget_is_exact(method: KVMethod) -> None:
    found, ids = reading(), _ids(9, seed=1)
    plan = plan_on(found, method, 1.0, torch.float32)
    check_plan(plan)
    _must(plan.keeps_all and plan.nbytes <= plan.full_nbytes, "a budget of 1 does not keep everything as it is")
    got = Decoder(found.model, plan.stores(), TOKENS).feed(ids, logits=ids.numel())
    with torch.no_grad():
        want = found.model(torch.cat([found.trace.ids, ids])[None]).logits[0, -ids.numel() :]
    furthest = float((got - want).abs().max() / want.abs().max())
    _must(furthest < _CLOSE, f"at a budget of 1 the logits differ from the model's own by {furthest:.1e}")
    sixteen = plan_on(found, method, 1.0)
    _must(sixteen.keeps_all, "a budget of 1 of a 16-bit cache does not keep everything")
    _must(float(sixteen.error.max()) < 0.02, "a budget of 1 of a 16-bit cache loses more than the rounding to 16 bits")


def kept_positions_ascend_and_are_positions(method: KVMethod) -> None:
    check_plan(plan_on(reading(), method))


def the_same_prompt_gives_the_same_plan(method: KVMethod) -> None:
    plans = [plan_on(fresh_reading(tokens=40), type(method)(**dict(method))) for _ in range(2)]
    _must(torch.equal(plans[0].tiers, plans[1].tiers), "two readings of the same prompt are planned differently")
    _must(plans[0].nbytes == plans[1].nbytes, "two readings of the same prompt take different bytes")


def nothing_is_left_on_the_method_the_model_or_the_trace(method: KVMethod) -> None:
    found, other = fresh_reading(tokens=40), fresh_reading(tokens=41)
    with _nothing_left(method, found.model, _recorded(found.trace)):
        first = plan_on(found, method)
        for store, layer in zip(first.stores(), found.trace.layers, strict=True):
            store.append(layer.keys[:, -1:], layer.values[:, -1:], torch.tensor([40]))
        evicting = first.stages.evict if first.evicts else None
        Decoder(found.model, first.stores(), 40, evicting).feed(_ids(3))
        plan_on(other, method)
        check_plan(first)
    again = plan_on(fresh_reading(tokens=40), method)
    _must(torch.equal(first.tiers, again.tiers), "another prompt in between changes the plan")


def allocation_shares_out_what_there_is(method: KVMethod) -> None:
    if not method.supplies("allocate") or not method.supplies("score"):
        return
    for architecture, tokens in (("llama", TOKENS), ("mha", 7), ("mqa", 1)):
        found = reading(architecture, tokens)
        study = study_of(found.trace, found.model)
        ranking = rank(study, method).beside(method.importance(study))
        least, before = ranking.layers * ranking.kv_heads, 0
        for entries in sorted({least + (tokens - 1) * least * step // 20 for step in range(21)}):
            counts = method.allocate(ranking, entries)
            total, asked = int(counts.sum()), f"{entries} entries of {least * tokens}"
            _must(tuple(counts.shape) == (ranking.layers, ranking.kv_heads), f"{asked}: counts are {counts.tolist()}")
            _must(not counts.is_floating_point(), f"{asked}: counts are {counts.dtype}, not whole numbers")
            _must(bool((counts >= 1).all()), f"{asked}: a head gets {int(counts.min())}")
            _must(bool((counts <= tokens).all()), f"{asked}: a head of {tokens} tokens gets {int(counts.max())}")
            _must(total <= entries, f"{asked}: {total} are given out")
            _must(total >= before, f"{asked}: {total} are given out, fewer than of less")
            unlike = bool((counts != counts[:, :1]).any())
            _must(
                method.head_adaptive or not unlike, "heads of a layer get different lengths: set head_adaptive = True"
            )
            before = total
        _must(before == least * tokens, f"{before} are given out where there is room for all {least * tokens}")


def merging_changes_only_what_it_must(method: KVMethod) -> None:
    if not method.supplies("merge"):
        return
    found = reading()
    plan = plan_on(found, method, 0.5)
    if plan.stages.score is None:
        return
    scores = rank(Study(found.trace, found.model), plan.stages.score).scores
    for layer, ranked in zip(found.trace.layers, scores, strict=True):
        keys, values = method.merge(layer, torch.ones_like(ranked, dtype=torch.bool), ranked)
        same = torch.equal(keys.float(), layer.keys.float()) and torch.equal(values.float(), layer.values.float())
        _must(same, "where nothing was dropped there is nothing to merge, but keys or values change")
        some = plan.tiers[layer.index] > 0
        keys, values = method.merge(layer, some, ranked)
        _must(keys.shape == layer.keys.shape and values.shape == layer.values.shape, "merging changes the shape")
        finite = bool(keys[some].isfinite().all()) and bool(values[some].isfinite().all())
        _must(finite, "merging gives numbers that are not finite")


def prompts_of_few_tokens_work(method: KVMethod) -> None:
    for tokens in (1, 2, 3, 7):
        check_plan(within(reading(tokens=tokens), method, 0.5))


def any_number_of_kv_heads_is_planned_by_kv_head(method: KVMethod) -> None:
    for architecture in ("llama", "mqa", "mha", "qwen3", "phi3"):
        found = reading(architecture)
        try:
            plan = plan_on(found, method)
        except NotApplicable:
            _must(architecture in ("qwen3", "phi3"), f"it cannot be applied to a Llama ({architecture})")
            continue
        shape = (len(found.trace.layers), found.trace.layers[0].kv_heads, TOKENS)
        check_plan(plan)
        _must(tuple(plan.tiers.shape) == shape, f"{architecture}: planned for {tuple(plan.tiers.shape)}, not {shape}")
        _check_scores(found, plan, shape)


def a_bfloat16_model_is_scored_in_float32(method: KVMethod) -> None:
    found = reading("llama", TOKENS, torch.bfloat16)
    plan = plan_on(found, method)
    check_plan(plan)
    _check_scores(found, plan, tuple(plan.tiers.shape))
    scorer = plan.stages.score
    if scorer is not None:
        dtype = scorer.scores(Study(found.trace, found.model)).dtype
        _must(dtype == torch.float32, f"a bfloat16 model's scores are {dtype}: many of them tie")


def _check_scores(found: Reading, plan: Plan, shape: tuple[int, ...]) -> None:
    if plan.stages.score is None:
        return
    scores = rank(Study(found.trace, found.model), plan.stages.score).scores
    _must(tuple(scores.shape) == shape, f"scores are [layers, KV heads, tokens] = {shape}, not {tuple(scores.shape)}")


def sliding_layers_stay_exact(method: KVMethod) -> None:
    found = reading("gemma3")
    try:
        plan = within(found, method, 0.6)
    except NotApplicable:
        return
    stores = check_plan(plan)
    for layer, window in ((x.index, x.window) for x in found.trace.layers):
        if window is None:
            continue
        held = list(range(TOKENS - window, TOKENS))
        store, where = stores[layer], f"layer {layer} slides"
        _must(store.sliding_window is not None and layer in plan.exact, f"{where}, but is compressed")
        _must(all(row.tolist() == held for row in store.positions), f"{where}, but does not hold its window")
        _must(float(plan.error[layer].max()) < 0.02, f"{where}, but is not exact")
    sliding = reading("mistral")
    everything = plan_on(sliding, method, 1.0)
    _must(everything.nbytes == everything.full_nbytes, "a model that slides in every layer is changed")
    if not _takes_budget(method):
        return
    try:
        plan_on(sliding, method, 0.5)
    except BudgetTooSmall:
        return
    raise MethodProblem("a model that slides in every layer cannot take less, but half a budget was not refused")


def a_conversation_goes_on_and_repeats_itself(method: KVMethod) -> None:
    found = reading()
    session = Session((found.model, None))
    session.read(found.trace.ids)
    method = feasible(found, method)
    first, second = _ids(6, seed=2), _ids(5, seed=3)
    with _nothing_left(method, found.model, _recorded(_read_by(session))):
        runs = [session.run(method, question=first, max_new_tokens=4) for _ in range(2)]
        _must(runs[0].tokens == runs[1].tokens, "the same question gets another answer the second time")
        asked = [runs[0].ask(second, max_new_tokens=4) for _ in range(2)]
        _must(asked[0].tokens == asked[1].tokens, "the same second question gets another answer the second time")
        for run, by_now in ((runs[0], TOKENS + 6 + 3), (asked[0], TOKENS + 6 + 4 + 5 + 3)):
            _check_positions(run, by_now)
        again = session.run(method, question=first, max_new_tokens=4)
        _must(again.tokens == runs[0].tokens, "a second question changes the answer to the first")


def _check_positions(run: Run, count: int) -> None:
    """Check that a run's stores hold true positions after `count` tokens, the newest included."""
    assert run.decoder is not None
    for layer, store in enumerate(run.decoder.stores):
        for held in store.positions:
            right = _ascending(held, count) and int(held[-1]) == count - 1
            _must(right, f"layer {layer}: after {count} tokens the positions held are {held.tolist()}")


def _read_by(session: Session) -> Trace:
    assert session.trace is not None
    return session.trace


# -- weight methods


@cache
def _studied() -> tuple[PreTrainedModel, WeightStudy]:
    """A tiny model and its calibration, which all weight methods share as those of a session do."""
    model = tiny("llama")
    return model, WeightStudy(model, calibration=SHORT)


def _compressed(method: WeightMethod) -> PreTrainedModel:
    model, study = _studied()
    return compressed(model, [method], study=lambda *_: study)


def the_original_model_is_unchanged(method: WeightMethod) -> None:
    model, _ = _studied()
    with _nothing_left(method, model):
        said = _logits(model)
        _logits(_compressed(method))
        _must(torch.equal(_logits(model), said), "the original model answers differently")


def compressed_layers_hold_no_more_than_foretold(method: WeightMethod) -> None:
    model, _ = _studied()
    survey, twin = method.survey(model), _compressed(method)
    _must(bool(_logits(twin).isfinite().all()), "the compressed model's logits are not finite")
    live = _held(survey, model, twin)
    _must(live <= survey.nbytes, f"{survey.nbytes} bytes foretold, {live} held")


def _held(survey: Survey, model: PreTrainedModel, twin: PreTrainedModel) -> int:
    """Live bytes of what stands in the twin for the weights that a method takes; those it left as it counts them."""
    taken = {id(linear.weight) for linear in survey.linears.values()}
    shared = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    held = [*twin.parameters(), *twin.buffers()]
    left = {id(tensor) for tensor in held} & taken
    kept = {id(linear.weight): linear for linear in survey.linears.values() if id(linear.weight) in left}
    return tensor_bytes(t for t in held if id(t) not in shared) + sum(map(survey.method.full_nbytes, kept.values()))


def weights_keep_to_the_budget(method: WeightMethod) -> None:
    model, _ = _studied()
    for budget in BUDGETS:
        asked = method.with_budget(budget)
        try:
            twin = _compressed(asked)
        except BudgetTooSmall as refusal:
            _must(budget < refusal.smallest, f"the budget {budget} is refused, and {refusal.smallest} named")
            if refusal.smallest > 1:
                continue
            budget = refusal.smallest
            asked = method.with_budget(budget)
            twin = _compressed(asked)
        survey = asked.survey(model)
        live = _held(survey, model, twin)
        _must(
            live <= survey.nbytes, f"a budget of {budget} is foretold to take {survey.nbytes} bytes, and takes {live}"
        )
        _must(survey.nbytes <= budget * survey.full_nbytes, f"a budget of {budget} takes {survey.nbytes} bytes")


def the_same_weights_come_out_twice(method: WeightMethod) -> None:
    one, two = _compressed(method), compressed(tiny("llama"), [type(method)(**dict(method))])
    _must(torch.equal(_logits(one), _logits(two)), "compressing the same model twice gives two models")


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(_ids(12)[None]).logits[0]
    return logits


# -- attention methods


def a_whole_budget_attends_exactly(method: AttentionMethod) -> None:
    if not _takes_budget(method):
        return
    whole = method.with_budget(1.0)
    for architecture in ("llama", "mqa", "gemma3"):
        for tokens in (1, 2, TOKENS):
            found = reading(architecture, tokens)
            got = read(found.model, facts(found.model), found.trace.prompt, method=whole)
            furthest = float((got.logits - found.trace.logits).abs().max() / found.trace.logits.abs().max())
            where = f"{architecture}, {tokens} tokens"
            _must(furthest < _CLOSE, f"{where}: at a budget of 1 the logits differ from exact ones by {furthest:.1e}")


def attention_keeps_to_the_budget(method: AttentionMethod) -> None:
    for architecture in ("llama", "gemma3") if _takes_budget(method) else ():
        found = reading(architecture)
        layers = len(found.trace.layers)
        full = layers * TOKENS * (TOKENS + 1) // 2
        for budget in BUDGETS:
            asked = method.with_budget(budget)
            try:
                asked.check(TOKENS, layers)
            except BudgetTooSmall as refusal:
                _must(budget < refusal.smallest <= 1, f"the budget {budget} is refused, and {refusal.smallest} named")
                budget = refusal.smallest
                asked = method.with_budget(budget)
                asked.check(TOKENS, layers)
            foretold = asked.entries(TOKENS, layers)
            _must(foretold <= budget * full, f"a budget of {budget} foretells {foretold} of {full} score entries")
            got = read(found.model, facts(found.model), found.trace.prompt, method=asked)
            computed = sum(got.computed)
            _must(computed > 0, "it does not tell the pass how many score entries it computed")
            heads = found.trace.layers[0].heads
            said = f"{foretold} score entries a head are foretold, {computed / heads:.1f} computed"
            _must(computed <= foretold * heads, said)


def what_comes_after_changes_nothing_before(method: AttentionMethod) -> None:
    if method.looks_ahead:
        return
    found, ids = reading(), reading().trace.ids
    one, other = (Prompt(torch.cat([ids[:-9], _ids(9, seed)]), chat=False) for seed in (1, 2))
    rows = [read(found.model, facts(found.model), prompt, method=method).layers[-1].keys for prompt in (one, other)]
    same = torch.equal(rows[0][:, : TOKENS - 9], rows[1][:, : TOKENS - 9])
    close = torch.allclose(rows[0][:, : TOKENS - 9], rows[1][:, : TOKENS - 9], rtol=1e-4, atol=1e-5)
    _must(same or close, "a token sees what comes after it")


def decoding_goes_on_as_reading_would(method: AttentionMethod) -> None:
    found = reading()
    session = Session((found.model, None), kv_dtype="float32")
    session.read(found.trace.ids)
    run = session.run(method, question=_ids(3, seed=2), max_new_tokens=4)
    again = session.run(method, question=_ids(3, seed=2), max_new_tokens=4)
    _must(run.tokens == again.tokens, "the same question gets another answer the second time")
    asked = run.ask(_ids(3, seed=3), max_new_tokens=2)
    _must(len(asked.tokens) == 2, "a second question is not answered")
    share = run.to_dict(quality=False)["score_share"]
    _must(share is not None and 0 < share <= 1, f"the run reports {share} of the score entries")
    later = run.decode_score_share
    _must(later is not None and 0 < later <= 1, f"the run reports {later} of the score entries while decoding")


def decoding_at_a_whole_budget_is_exact(method: AttentionMethod) -> None:
    if not method.decodes or not _takes_budget(method):
        return
    for architecture, kv in (("llama", ()), ("gemma3", ()), ("mqa", (("knorm", {"budget": 0.5}),)), ("llama", _RAGGED)):
        got, want = (_decoded(architecture, kv, chosen)[0] for chosen in (method.with_budget(1.0), None))
        furthest = float((got - want).abs().max() / want.abs().max())
        over = f"{architecture}, over what {kv[0][0]} keeps" if kv else architecture
        _must(furthest < _CLOSE, f"{over}: at a budget of 1 decoding differs from exact attention by {furthest:.1e}")


def decoding_computes_no_more_than_exact_attention(method: AttentionMethod) -> None:
    for kv in ((), _RAGGED, _PACKED):
        (_, exact), (logits, share) = (_decoded("llama", kv, chosen) for chosen in (None, method))
        over = f"over what {kv[0][0]} keeps" if kv else "over the whole cache"
        _must(bool(logits.isfinite().all()), f"{over}: decoding gives logits that are not finite")
        assert exact is not None
        _must(share is not None and share > 0, f"{over}: it does not tell the pass what it computed while decoding")
        assert share is not None
        _must(
            share <= exact + 1e-9, f"{over}: {share:.2%} of the score entries are computed, exact attention {exact:.2%}"
        )


_KVChosen = tuple[tuple[str, dict[str, Any]], ...]
_RAGGED: _KVChosen = (("adakv", {"budget": 0.6, "window": 8}),)
_PACKED: _KVChosen = (("kivi", {}),)


def _decoded(architecture: str, kv: _KVChosen, attention: AttentionMethod | None) -> tuple[Tensor, float | None]:
    """Logits [t, v] of tokens after the usual prompt, read exactly, under KV methods and an attention method that
    decodes (or exact attention); and the share of the score entries computed.
    """
    found = reading(architecture)
    methods = [make(key, **parameters) for key, parameters in kv]
    plan = make_plan(found.trace, cast("list[KVMethod]", methods), torch.float32, model=found.model)
    chosen = attention if attention is not None and attention.decodes else None
    decoder = Decoder(found.model, plan.stores(), TOKENS, None, chosen, found.trace.layers)
    new = _ids(18, seed=5)
    logits = [decoder.feed(new[:6], logits=6), *[decoder.feed(token[None]) for token in new[6:]]]
    return torch.cat(logits), decoder.score_share


def reading_twice_gives_the_same(method: AttentionMethod) -> None:
    found = reading()
    with _nothing_left(method, found.model, _recorded(found.trace)):
        one, two = (read(found.model, facts(found.model), found.trace.prompt, method=method) for _ in range(2))
    _must(fingerprint(_recorded(one)) == fingerprint(_recorded(two)), "two readings of a prompt differ")


# -- operators

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
    _must(same, f"{broken}: the shapes are {list(got.shape)} and {list(want.shape)}")
    apart = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    _must(apart <= tolerance, f"{broken}: they differ by {apart:.1e} of the norm")


def chunks_give_what_the_whole_map_gives(operator: Operator) -> None:
    for tokens, heads, kv_heads in ((1, 2, 1), (2, 2, 2), (33, 4, 2), (TOKENS, 6, 2)):
        q, k, v = _drawn(tokens, heads, kv_heads)
        want = operator.plain(q, k, v, _SCALE)
        implied = operator.weights(q, k, _SCALE) @ per_head(v, heads)
        _agree(want, implied, f"{tokens} tokens: the output is not what the implied map makes of the values")
        for chunk in (1, 7, 16, tokens):
            got = type(operator)(**{**dict(operator), "chunk": chunk}).apply(q, k, v, _SCALE)
            _agree(got, want, f"{tokens} tokens: chunks of {chunk} give another output than the whole map")


def rows_are_those_of_the_whole_map(operator: Operator) -> None:
    q, k, _ = _drawn(60)
    whole = operator.weights(q, k, _SCALE)
    _must(whole.shape == (4, 60, 60) and whole.dtype == torch.float32, f"the map is {whole.dtype} {list(whole.shape)}")
    for first, stop in ((0, 1), (0, 60), (7, 8), (20, 45), (59, 60)):
        got = operator.rows(q, k, _SCALE, first, stop)
        _agree(got, whole[:, first:stop, :stop], f"rows {first} to {stop} are not those of the whole map")


def what_follows_changes_no_output_before(operator: Operator) -> None:
    tensors = _drawn(64)
    before, weights = operator.apply(*tensors, _SCALE), operator.weights(*tensors[:2], _SCALE)
    _must(not bool(weights.triu(1).any()), "a query gives weight to a token after it")
    for at in (1, 16, 40):
        q, k, v = (torch.cat([x[:, :at], 5 * y[:, at:]], 1) for x, y in zip(tensors, _drawn(64, seed=9), strict=True))
        broken = f"what comes after position {at - 1} changes what was before it"
        _agree(operator.apply(q, k, v, _SCALE)[:, :at], before[:, :at], broken, 1e-5)
        _agree(operator.weights(q, k, _SCALE)[:, :at], weights[:, :at], broken, 1e-5)
        q, k, v = (x[:, :at] for x in tensors)
        _agree(operator.apply(q, k, v, _SCALE), before[:, :at], f"how much comes after {at - 1} changes it", 1e-5)


def outputs_have_the_shape_and_precision_of_the_queries(operator: Operator) -> None:
    exact = operator.apply(*_drawn(30), _SCALE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        q, k, v = (x.to(dtype) for x in _drawn(30))
        for got in (operator.apply(q, k, v, _SCALE), operator.plain(q, k, v, _SCALE)):
            right = got.dtype == dtype and got.shape == (4, 30, 6)
            _must(right, f"queries {dtype} [4, 30, 8] and values of 6 give {got.dtype} {list(got.shape)}")
        same = operator.apply(q.float(), k.float(), v.float(), _SCALE)
        _agree(operator.apply(q, k, v, _SCALE), same, f"{dtype}: it is not computed in float32 or better", 1e-2)
    _must(bool(exact.isfinite().all()), "the output is not finite")


def large_inputs_give_finite_outputs(operator: Operator) -> None:
    for size in (1e-4, 1e2, 1e4):
        q, k, v = _drawn(40)
        _must(bool(operator.apply(size * q, size * k, v, _SCALE).isfinite().all()), f"inputs of {size} overflow")
        _must(bool(operator.weights(size * q, size * k, _SCALE).isfinite().all()), f"the map of inputs of {size} does")
    layer = reading().trace.layers[1]
    out = operator.apply(layer.queries, layer.keys, layer.values, layer.scale)
    _must(bool(out.isfinite().all()), "what a model recorded gives an output that is not finite")


def each_head_is_by_itself(operator: Operator) -> None:
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


def the_same_inputs_give_the_same_output(operator: Operator) -> None:
    tensors = _drawn(50)
    with _nothing_left(operator, nn.Module(), tensors):
        one, _ = operator.apply(*tensors, _SCALE), operator.weights(*tensors[:2], _SCALE)
        operator.apply(*_drawn(31, seed=3), _SCALE)
    two = type(operator)(**dict(operator)).apply(*tensors, _SCALE)
    _must(torch.equal(one, two), "the same queries, keys and values give another output the second time")


def an_operator_takes_no_budget(operator: Operator) -> None:
    try:
        operator.with_budget(0.5)
    except BadBudget:
        return
    raise MethodProblem("it is never run in a model, so there is nothing to budget, but it takes a budget")


PROMISES: dict[type[Method], tuple[Promise, ...]] = {
    KVMethod: (
        describes_itself,
        nothing_is_left_on_the_method_the_model_or_the_trace,
        live_bytes_are_those_planned_and_within_the_budget,
        a_refusal_names_the_smallest_budget_that_works,
        a_whole_budget_is_exact,
        kept_positions_ascend_and_are_positions,
        the_same_prompt_gives_the_same_plan,
        allocation_shares_out_what_there_is,
        merging_changes_only_what_it_must,
        prompts_of_few_tokens_work,
        any_number_of_kv_heads_is_planned_by_kv_head,
        a_bfloat16_model_is_scored_in_float32,
        sliding_layers_stay_exact,
        a_conversation_goes_on_and_repeats_itself,
    ),
    WeightMethod: (
        describes_itself,
        the_original_model_is_unchanged,
        compressed_layers_hold_no_more_than_foretold,
        weights_keep_to_the_budget,
        the_same_weights_come_out_twice,
    ),
    AttentionMethod: (
        describes_itself,
        a_whole_budget_attends_exactly,
        attention_keeps_to_the_budget,
        what_comes_after_changes_nothing_before,
        decoding_goes_on_as_reading_would,
        decoding_at_a_whole_budget_is_exact,
        decoding_computes_no_more_than_exact_attention,
        reading_twice_gives_the_same,
    ),
    Operator: (
        describes_itself,
        chunks_give_what_the_whole_map_gives,
        rows_are_those_of_the_whole_map,
        what_follows_changes_no_output_before,
        outputs_have_the_shape_and_precision_of_the_queries,
        large_inputs_give_finite_outputs,
        each_head_is_by_itself,
        the_same_inputs_give_the_same_output,
        an_operator_takes_no_budget,
    ),
}
"""What methods of each family promise."""
