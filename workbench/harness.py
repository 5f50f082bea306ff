"""EleutherAI's lm-evaluation-harness under recipes: its tasks on a session's model, and a recipe as one of its models.

Its contexts are read and compressed as prompts are; its continuations are predicted token by token, and its answers
made greedily, on what the recipe kept. So a task whose context is short says little of a KV method, whatever it scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import BadParameter, BadPrompt, MissingExtra, NotApplicable, NotRead, PromptTooLong, UnknownTask
from workbench.progress import Progress
from workbench.recipe import Recipe, Spec
from workbench.runtime.evaluate import teacher_forcing

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from workbench.budget import BudgetLike
    from workbench.session import Session

_NEEDED = (
    "lm-evaluation-harness is not installed, or not whole: pip install 'inference-workbench[lm-eval]', which brings "
    "lm_eval and its data sets library"
)
_SAID = 256  # tokens of an answer whose task gives no bound: lm-eval's own number


@dataclass(frozen=True)
class Scorer:
    """What lm-eval asks of a model, under one recipe. Its session's prompt and runs are replaced by each question."""

    session: Session
    recipe: Recipe
    progress: Progress

    def loglikelihoods(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[tuple[int, float, bool]]:
        """For contexts and continuations, both token ids: place, sum of log-probabilities, whether each was likeliest.

        In the order of contexts, each of which is read once. Raises PromptTooLong where both have no place together.
        """
        order = sorted(range(len(pairs)), key=lambda place: tuple(pairs[place][0]))
        steps = iter(self.progress.track(range(len(pairs)), "lm-eval: continuations", len(pairs)))
        for context, places in groupby(order, key=lambda place: tuple(pairs[place][0])):
            self.session.read(context, progress=self.progress)
            run = self.session.run(self.recipe, max_new_tokens=1, progress=self.progress)
            if run.conversation is None:
                raise NotRead("the run has no cache to go on from: run it again")
            for place in places:
                next(steps, None)
                target = torch.tensor(list(pairs[place][1]), dtype=torch.long)
                self._fits(len(context) + len(target) - 1, endless=run.plan.endless)
                nothing = torch.empty(0, dtype=torch.long)
                logits, _ = teacher_forcing(run.conversation.decoder(), run.plan.logits, nothing, target)
                yield place, *_likelihood(logits, target)
            run.release()
        next(steps, None)

    def answer(self, context: Sequence[int], stops: Sequence[str], most: int) -> str:
        """The greedy answer of at most so many tokens, up to the first of the texts in `stops`."""
        self.session.read(list(context), progress=self.progress)
        said = ""
        for token in self.session.stream(self.recipe, max_new_tokens=most, progress=self.progress):
            said += token.text
            if any(stop in said for stop in stops):
                break
        return min((said.split(stop)[0] for stop in stops), key=len, default=said)

    def _fits(self, tokens: int, *, endless: bool) -> None:
        most = self.session.facts.max_positions
        if tokens > most and not endless:
            raise PromptTooLong(
                f"a context and its continuation have {tokens} tokens, and {self.session.facts.name} has {most} "
                "positions; take fewer examples (num_fewshot in the task), or another model"
            )


def _likelihood(logits: Tensor, target: Tensor) -> tuple[float, bool]:
    """The sum of the log-probabilities of target [t] by logits [t, v], and whether each token was the likeliest."""
    found = logits.double().log_softmax(-1).gather(1, target[:, None])
    return float(found.sum()), bool((logits.argmax(-1) == target).all())


def harness_model(
    session: Session,
    recipe: Spec = "full",
    *,
    budget: BudgetLike | None = None,
    progress: Progress | None = None,
    **parameters: Any,
) -> Any:
    """A recipe as a model of lm-eval (`lm_eval.api.model.LM`), for `lm_eval.simple_evaluate(model=...)`.

    recipe, budget, parameters: as everywhere where a recipe is taken. Perplexity over whole texts
    (`loglikelihood_rolling`) has no prompt that a KV method could compress: it is refused under any but the full cache.
    Raises BadPrompt for a session without a tokenizer, MissingExtra.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import has_bos_prefix
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise MissingExtra(_NEEDED) from error
    if session.tokenizer is None:
        raise BadPrompt("lm-eval's tasks are texts, and this session reads token ids only: give it a tokenizer")
    tokenizer: PreTrainedTokenizerBase = session.tokenizer
    scorer = Scorer(session, Recipe.of(recipe, budget=budget, **parameters), progress or Progress())
    ends = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(session.facts.eos_ids), None)
    begin = ends if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(begin, int):
        raise BadPrompt("this tokenizer has no first or last token for lm-eval to begin an empty context with")
    begins: int = begin

    class RecipeModel(TemplateLM):
        """A session's model under one recipe."""

        eot_token_id = begins if ends is None else ends
        prefix_token_id = begins

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def tokenizer_name(self) -> str:
            return str(session.source).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            if add_special_tokens is None:
                add_special_tokens = not has_bos_prefix(string, tokenizer.decode(begins))
            return list(tokenizer.encode(string, add_special_tokens=add_special_tokens))

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            found = [(0.0, False)] * len(requests)
            for place, total, greedy in scorer.loglikelihoods([(each[1], each[2]) for each in requests]):
                found[place] = total, greedy
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            kept = [method.key for method in scorer.recipe.family("kv") if method.key != "full"]
            if kept:
                raise NotApplicable(
                    f"{', '.join(kept)}: likelihoods of whole texts have no prompt that a KV method could compress; "
                    "use the workbench's own task `perplexity`, which predicts what follows a prompt"
                )
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0]),
                    prefix_token=begins,
                    max_seq_len=session.facts.max_positions,
                    context_len=1,
                )
                pairs = [make_disjoint_window(window) for window in windows]
                totals.append(sum(total for _, total, _ in scorer.loglikelihoods(pairs)))
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [scorer.answer(self.tok_encode(each.args[0]), *_asked(each.args[1])) for each in requests]

    return RecipeModel()


def _asked(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """The texts that end an answer, and its longest length in tokens. Raises NotApplicable where it would be drawn."""
    if options.get("do_sample") and options.get("temperature") != 0:
        raise NotApplicable(
            "this task draws its answers at random, and recipes answer greedily: set do_sample to false"
        )
    stops = options.get("until") or []
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    most = next((int(options[name]) for name in names if options.get(name) is not None), _SAID)
    return [stop for stop in ([stops] if isinstance(stops, str) else stops) if stop], most


def harness(
    session: Session,
    tasks: Sequence[str] | str,
    recipe: Spec = "full",
    *,
    budget: BudgetLike | None = None,
    folder: str | Path | None = None,
    limit: int | None = None,
    bootstrap: int = 0,
    progress: Progress | None = None,
    **parameters: Any,
) -> pd.DataFrame:
    """lm-eval's tasks under a recipe: one row a task and metric, beside what the uncompressed model gets.

    Columns: task, metric, value, full_value, stderr, full_stderr, samples, recipe. tasks: names, as lm-eval knows them.
    folder: where the tasks stand in lm-eval's YAML, in place of its own, whose data may be local files (`dataset_path:
    json` with `data_files`).
    limit: of cases. bootstrap: draws for standard errors, as lm-eval's `bootstrap_iters` (0: none are given). The
    session's prompt and runs are replaced. Raises UnknownTask, BadParameter, MissingExtra, and what `Session.run` does.
    """
    import pandas as pd

    try:
        from lm_eval.evaluator import evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra(_NEEDED) from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if limit is not None and limit < 1:
        raise BadParameter(f"limit is {limit}: at least one case")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        there = f"{folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else "`lm-eval ls tasks` lists them"
        raise UnknownTask(f"no task of lm-eval is called {', '.join(unknown) or 'nothing: name one'}; {there}")
    under = Recipe.of(recipe, budget=budget, **parameters)

    def measured(spec: Recipe) -> dict[str, Any]:
        model = harness_model(session, spec, progress=progress)
        found = evaluate(model, manager.load(names)["tasks"], limit=limit, bootstrap_iters=bootstrap, log_samples=False)
        return dict(found)

    plain = measured(Recipe.of("full"))
    found = plain if under == Recipe.of("full") else measured(under)
    rows = [
        {
            "task": task,
            "metric": metric,
            "value": value,
            "full_value": plain["results"][task][metric],
            "stderr": _error(figures, metric),
            "full_stderr": _error(plain["results"][task], metric),
            "samples": found["n-samples"][task]["effective"],
            "recipe": under.label,
        }
        for task, figures in found["results"].items()
        for metric, value in figures.items()
        if "," in metric and "_stderr," not in metric
    ]
    return pd.DataFrame(rows)


def _error(figures: Mapping[str, Any], metric: str) -> float | None:
    name, _, filtered = metric.partition(",")
    value = figures.get(f"{name}_stderr,{filtered}")
    return value if isinstance(value, float) else None
