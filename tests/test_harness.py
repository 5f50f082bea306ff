"""lm-eval's tasks under recipes: the likelihoods of the plain model at full budget, a table, refusals in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.errors import BadParameter, NotApplicable, PromptTooLong, UnknownTask

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
CHOICES = """doc_to_choice: "{{options}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SAYS = """doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
SKY = "The sky is blue and the grass is green. " * 6 + "The sky is"


@pytest.fixture(scope="module")
def session() -> wb.Session:
    return wb.Session("workbench-tiny", kv_dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tasks")
    cases = [{"text": SKY, "options": [" blue", " green and", " x"], "right": 0, "answer": "blue"}] * 2
    (found / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)), encoding="utf-8")
    of: dict[str, Any] = {"data": found / "cases.jsonl", "cache": found / "cache"}
    for name, kind, rest in (("choosing", "multiple_choice", CHOICES), ("saying", "generate_until", SAYS)):
        (found / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, **of) + rest, encoding="utf-8")
    return found


def request(kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_likelihoods_at_full_budget_are_those_of_the_plain_model(session: wb.Session) -> None:
    from workbench.harness import harness_model

    pairs = [(SKY, " blue"), ("One two", " three four"), (SKY, " green and red"), ("", "Hello there")]
    for model in (harness_model(session), harness_model(session, "snapkv", budget=1.0)):
        found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
        for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
            before, after = (
                model._encode_pair(context, continuation)
                if context
                else ([model.prefix_token_id], model.tok_encode(continuation, add_special_tokens=False))
            )
            with torch.no_grad():
                logits = session.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            wanted = torch.tensor(after)
            exact = logits.double().log_softmax(-1).gather(1, wanted[:, None]).sum()
            assert total == pytest.approx(float(exact), abs=1e-4)
            assert greedy == bool((logits.argmax(-1) == wanted).all())


def test_a_whole_text_is_as_likely_as_plainly_and_no_kv_method_measures_it(session: wb.Session) -> None:
    from workbench.harness import harness_model

    model = harness_model(session)
    (total,) = model.loglikelihood_rolling([request("loglikelihood_rolling", "The sky is blue.")])
    ids = [model.prefix_token_id, *model.tok_encode("The sky is blue.")]
    with torch.no_grad():
        logits = session.model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    assert total == pytest.approx(float(logits.gather(1, torch.tensor(ids[1:])[:, None]).sum()), abs=1e-4)
    with pytest.raises(NotApplicable, match="perplexity"):
        harness_model(session, "snapkv", budget=0.5).loglikelihood_rolling([request("loglikelihood_rolling", "Sky.")])


def test_local_tasks_give_a_table_beside_the_uncompressed_model(session: wb.Session, folder: Path) -> None:
    from workbench.harness import harness

    table = harness(session, ["choosing", "saying"], "knorm", budget=0.3, folder=folder, limit=1)
    assert set(table.task) == {"choosing", "saying"} and {"acc,none", "exact_match,none"} <= set(table.metric)
    assert (table.samples == 1).all() and table.recipe.str.contains("knorm", case=False).all()
    same = harness(session, "choosing", "full", folder=folder)
    assert (same.value == same.full_value).all() and (same.samples == 2).all()
    assert same.full_value.tolist() == table[table.task == "choosing"].full_value.tolist()


def test_answers_end_at_the_first_stop_and_are_what_the_recipe_says(session: wb.Session) -> None:
    from workbench.harness import harness_model

    model = harness_model(session)
    options: dict[str, Any] = {"until": ["."], "max_gen_toks": 12}
    (said,) = model.generate_until([request("generate_until", SKY, options)])
    session.read(model.tok_encode(SKY))
    assert said == session.run("full", max_new_tokens=12).text.split(".")[0]
    with pytest.raises(NotApplicable, match="greedily"):
        model.generate_until([request("generate_until", SKY, {"do_sample": True, "temperature": 0.7})])


def test_what_cannot_be_is_refused_in_one_line(session: wb.Session, folder: Path) -> None:
    from workbench.harness import harness, harness_model

    with pytest.raises(UnknownTask, match="nothing-like-it"):
        harness(session, "nothing-like-it", folder=folder)
    with pytest.raises(BadParameter, match="at least one"):
        harness(session, "choosing", folder=folder, limit=0)
    most = session.facts.max_positions
    with pytest.raises(PromptTooLong):
        harness_model(session)._loglikelihood_tokens([(("", ""), [5] * (most - 1), [5] * 3)])
