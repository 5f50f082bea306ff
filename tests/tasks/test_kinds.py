"""Every kind of task that makes its texts: drawn by the seed, as long as asked for, and answered by its own text."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from tests.byte_tokens import byte_tokenizer
from workbench.errors import BadParameter, UnknownTask
from workbench.tasks import KINDS, Generated, Task, find

BESIDE = ("multi-key", "chain")  # their facts come on top of the length
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("needle", {"depth": 0.0}),
    ("needle", {"asked": "first"}),
    ("multi-value", {"values": 8}),
    ("variable-tracking", {"chains": 2}),
    ("common-words", {"shots": 1, "length": 1024}),
    ("qa", {"hops": 2}),
    ("dialogue", {"changed": True}),
    ("code", {"target": "name"}),
)


def words(text: str) -> list[int]:
    """A token for each word."""
    return [len(word) for word in text.split()]


def made() -> Iterator[Task]:
    for kind in KINDS:
        if issubclass(kind, Generated) and kind.key != "perplexity":
            yield kind(length=512)
    for key, parameters in VARIANTS:
        yield wb.task(key, **{"length": 512, **parameters})


ALL = pytest.mark.parametrize("task", list(made()), ids=lambda task: task.label)


@ALL
def test_the_same_parameters_give_the_same_case_and_the_next_seed_another(task: Task) -> None:
    case = task.case(words)
    assert case == type(task)(**dict(task)).case(words)
    later = type(task)(**{**dict(task), "seed": 1})
    assert task.case(words, 1) == later.case(words) != case
    assert list(task.cases(words, 2)) == [case, later.case(words)]


@ALL
def test_a_case_is_as_long_as_asked_for_and_its_text_holds_what_is_expected(task: Task) -> None:
    for case in task.cases(words, 3):
        assert isinstance(case.text, str) and case.answers
        length: int = dict(task)["length"]
        assert len(words(case.text)) <= length + (60 if task.key in BESIDE or "first" in task.label else 0)
        assert len(words(case.text)) > length / 4
        names = re.findall(r"[^\W\d]\w*", " ".join(case.answers)) if task.key == "code" else case.answers
        assert all(name in case.text or keyword.iskeyword(name) for name in names)
        assert not any(answer in case.lead for answer in case.answers)


@ALL
def test_the_expected_reply_is_right_and_another_cases_is_not(task: Task) -> None:
    case, other = task.case(words), task.case(words, 3)
    assert case.answers != other.answers
    assert case.right(f"{' and '.join(case.answers)}") and case.score(" ".join(case.answers)) == 1
    assert not case.right(" ".join(other.answers)) and not case.right("")


def test_the_needle_stands_where_it_was_asked_to() -> None:
    for depth in (0.0, 0.5, 1.0):
        case = wb.task("needle", length=800, depth=depth).case(words)
        assert isinstance(case.text, str)
        assert case.text.index(case.answers[0]) / len(case.text) == pytest.approx(depth, abs=0.08)


def test_a_changed_fact_is_told_twice_and_the_newest_is_right() -> None:
    plain, changed = (wb.task("dialogue", length=600, changed=flag).case(words, 2) for flag in (False, True))
    assert isinstance(changed.text, str) and changed.answers[0] in changed.text
    assert plain.scorer == changed.scorer == "any"
    told = [turn for turn in changed.text.splitlines() if changed.answers[0] in turn]
    assert any(word in told[-1] for word in ("again", "new", "after all", "back", "moved", "now"))


def test_the_common_words_are_the_most_common_in_the_list() -> None:
    case = wb.task("common-words", length=700).case(words)
    assert isinstance(case.text, str)
    listed = Counter(case.text.split("\n", 1)[1].split()[1::2])
    assert {word for word, _ in listed.most_common(10)} == set(case.answers)
    assert listed.most_common(11)[-1][1] == 1 and listed.most_common(10)[-1][1] == 6


def test_each_variable_leads_back_to_the_value_asked_for() -> None:
    case = wb.task("variable-tracking", length=600, chains=3).case(words)
    assert isinstance(case.text, str) and case.question is not None
    value = case.question.removesuffix("?").split()[-1]
    holds = {}
    for sentence in case.text.replace("\n\n", " ").split(". "):
        if sentence.startswith("Variable "):
            name, what = sentence.removeprefix("Variable ").rstrip(".").split(" is ")
            holds[name] = holds[what.removeprefix("variable ")] if "variable" in what else what
    assert {name for name, held in holds.items() if held == value} == set(case.answers) and len(
        set(holds.values())
    ) == 3


def test_code_is_the_librarys_own_and_goes_on_with_what_is_expected() -> None:
    for target in ("line", "name"):
        for case in wb.task("code", length=300, target=target).cases(words, 3):
            spec = find_spec(case.origin.split(", ")[1])
            assert spec is not None and spec.origin is not None and isinstance(case.text, str)
            _, after = Path(spec.origin).read_text(encoding="utf-8").split(case.text, 1)
            assert after.lstrip().startswith(case.answers[0])


def test_perplexity_reads_ids_and_predicts_those_that_follow(tmp_path: Path) -> None:
    encode = byte_tokenizer().encode
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + index % 26) for index in range(300)))
    task = wb.task("perplexity", length=100, predicted=20, path=str(path))
    whole = encode(path.read_text())
    assert [(*case.text, *case.continuation) for case in task.cases(encode, 2)] == [
        tuple(whole[:120]),
        tuple(whole[120:240]),
    ]
    with pytest.raises(BadParameter, match=r"300 tokens.*token 360"):
        task.case(encode, 2)
    assert task.case(encode).score("anything") is None


@pytest.mark.parametrize(
    ("key", "parameters", "message"),
    [
        ("needle", {"depth": 1.5}, "depth=1.5"),
        ("needle", {"lenght": 5}, "did you mean 'length'"),
        ("needle", {"length": 4}, "length=4"),
        ("needle", {"asked": "never"}, "asked='never'"),
        ("multi-key", {"seed": -1}, "seed=-1"),
        ("qa", {"hops": True}, "hops"),
    ],
)
def test_a_wrong_parameter_is_refused_in_one_line(key: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(BadParameter, match=message) as caught:
        wb.task(key, **parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["common-words", "multi-value", "qa"])
def test_a_length_without_room_is_refused(key: str) -> None:
    length = find(key).model_fields["length"].metadata[0].ge
    with pytest.raises(BadParameter, match="length is"):
        wb.task(key, length=length).case(lambda text: list(text.encode()))


def test_an_unknown_task_names_the_closest() -> None:
    with pytest.raises(UnknownTask, match="did you mean needle"):
        wb.task("neddle")
    with pytest.raises(UnknownTask, match="there are needle, multi-key"):
        wb.task("zzzz")


def test_the_package_is_called_for_the_catalogue_however_it_was_imported() -> None:
    import workbench.tasks  # sets the attribute that `wb.tasks` reads

    assert wb.tasks is workbench.tasks
    table = wb.tasks()
    assert table.key.tolist() == [kind.key for kind in KINDS] and table.key.is_unique
    assert (table.summary.str.len() > 10).all() and (table.name.str.len() > 0).all()
