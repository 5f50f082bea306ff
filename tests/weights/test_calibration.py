"""Calibration: what is gathered is what plain loops find, once for all methods, and nothing stays behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import workbench as wb
from workbench.errors import BadParameter, Cancelled, InputError
from workbench.models import tiny
from workbench.progress import Progress
from workbench.weights import RTN
from workbench.weights.calibration.study import WeightStudy
from workbench.weights.calibration.texts import PYTHON, SAMPLED, SHIPPED, Calibration
from workbench.weights.variants import Variants

SHORT = Calibration(SAMPLED, samples=6, tokens=24)


def study_of(model: PreTrainedModel, **options: Any) -> WeightStudy:
    return WeightStudy(model, calibration=SHORT, **options)


def entering(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """What enters every linear layer of the blocks over all texts [n, i], float64, by hooks on the whole model."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).double())
        )
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


# --- What is gathered


@pytest.mark.parametrize(
    "architecture", ["llama", "mqa", "qwen2", "qwen3", "mistral", "gemma3", "phi3", "mixtral", "qwen3-moe"]
)
def test_statistics_are_those_of_the_whole_models_pass(architecture: str) -> None:  # trap W7
    model = tiny(architecture)
    study = study_of(model)
    seen, names = entering(model, study.ids), []
    for _, inputs in study.inputs(hessians=True):
        for name, stats in inputs.items():
            x = seen[name]
            names.append(name)
            assert stats.tokens == len(x) == study.ids.numel()
            first = x.unflatten(0, study.ids.shape)[:, 0]
            for got, want in (
                (stats.mean, x.mean(dim=0)),
                (stats.absmean, x.abs().mean(dim=0)),
                (stats.absmax, x.abs().amax(dim=0)),
                (stats.square, x.square().mean(dim=0)),
                (stats.hessian, x.T @ x / len(x) + 0.05 * first.T @ first / len(first)),
            ):
                torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-4)
    assert sorted(names) == sorted(seen)


def test_layers_with_the_same_input_share_one_statistic() -> None:
    for _, inputs in study_of(tiny("llama")).inputs(hessians=True):
        q, k, v, o, gate, up, down = inputs.values()
        assert q is k is v and gate is up
        assert len({id(each) for each in (q, o, gate, down)}) == 4


def test_the_output_error_is_that_of_the_outputs() -> None:
    model = tiny("llama")
    study = study_of(model)
    name = "model.layers.1.mlp.down_proj"
    x = entering(model, study.ids)[name]
    change = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    stats = next(inputs[name] for _, inputs in study.inputs(hessians=True) if name in inputs)
    first = x.unflatten(0, study.ids.shape)[:, 0]
    every, beginning = (torch.stack([(x @ row.double()).square().mean() for row in change]) for x in (x, first))
    want = every + 0.05 * beginning
    torch.testing.assert_close(stats.output_error(change).double(), want, rtol=1e-3, atol=1e-3)


def test_blocks_that_do_little_are_alike_on_both_sides() -> None:
    model = tiny("llama")
    quiet: Any = model.get_submodule("model.layers.1")
    quiet.self_attn.o_proj.weight.data.mul_(1e-3)
    quiet.mlp.down_proj.weight.data.mul_(1e-3)
    similarity = study_of(model).similarity()
    assert similarity.shape == (3,)
    assert float(similarity[1]) > 0.999 > float(similarity[0])


def test_gradients_are_those_of_autograd_and_none_stays_on_the_model() -> None:
    model = tiny("llama")
    study = study_of(model)
    name = "model.layers.1.self_attn.k_proj"
    found = study.gradients()[name]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    weight: Any = model.get_submodule(name).weight
    squares = torch.zeros_like(weight)
    weight.requires_grad_(True)
    for text in study.ids:
        loss = nn.functional.cross_entropy(model(text[None]).logits[0, :-1], text[1:])
        squares += torch.autograd.grad(loss, weight)[0].square() / len(study.ids)
    torch.testing.assert_close(found.rows, squares.sum(dim=1), rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(found.columns, squares.sum(dim=0), rtol=1e-3, atol=1e-8)


# --- Once


def test_a_second_pass_reads_what_the_first_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_of(tiny("qwen2"))
    first = {name: stats for _, inputs in study.inputs(hessians=True) for name, stats in inputs.items()}
    monkeypatch.setattr(study, "block_runner", None)
    again = {name: stats for _, inputs in study.inputs(hessians=True) for name, stats in inputs.items()}
    assert set(again) == set(first)
    for name, stats in first.items():
        assert again[name].tokens == stats.tokens
        assert torch.equal(again[name].hessian, stats.hessian)
        assert torch.equal(again[name].absmax, stats.absmax)


def test_the_cache_belongs_to_the_model_and_the_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    for model, calibration in (
        (tiny("llama"), SHORT),
        (tiny("llama"), SHORT),
        (tiny("llama", seed=1), SHORT),
        (tiny("llama"), Calibration(SAMPLED, samples=5, tokens=24)),
    ):
        for _ in WeightStudy(model, calibration=calibration, persistent=True).inputs(hessians=False):
            pass
    assert len(list((tmp_path / "calibration").iterdir())) == 3


def test_a_cancelled_pass_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    model = tiny("llama")
    study = study_of(model, persistent=True)
    progress = Progress(lambda stage, done, total: progress.cancel() if done == 1 else None)
    with pytest.raises(Cancelled):
        for _ in study.inputs(hessians=True, progress=progress):
            pass
    assert list((tmp_path / "calibration").iterdir()) == []
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert len(list(study.inputs(hessians=True))) == 3


def moments(study: WeightStudy) -> list[Tensor]:
    return [stats.hessian for _, inputs in study.inputs(hessians=True) for stats in inputs.values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_without_a_writable_cache_statistics_lie_elsewhere_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = moments(study_of(tiny("llama")))
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file" / "cache"))
    study = study_of(tiny("llama"), persistent=True)
    assert same(moments(study), want) and study.similarity().shape == (3,)
    monkeypatch.setattr(study, "block_runner", None)  # the second time they are read
    assert same(moments(study), want)
    assert len(study.notes) == 1 and "cannot be written to" in study.notes[0]
    session = wb.Session((tiny("llama"), None))
    session.read(torch.arange(20))
    run = session.run(wb.weights.Wanda(sequential=False), max_new_tokens=2)
    assert sum("calibration is not kept" in note for note in run.notes) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes")
@pytest.mark.parametrize("size", [0, 100_000])
def test_a_full_disk_stops_no_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    import resource

    want = moments(study_of(tiny("llama")))
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    study, before = study_of(tiny("llama"), persistent=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # what writes more than that is told so by the system
    try:
        found, again = moments(study), moments(study)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert same(found, want) and same(again, want) and study.similarity().shape == (3,)
    assert len(study.notes) == 2
    assert list((tmp_path / "calibration").iterdir()) == []
    assert same(moments(study_of(tiny("llama"), persistent=True)), want)


@pytest.mark.parametrize("name", ["0.safetensors", "2.safetensors", "blocks.safetensors"])
@pytest.mark.parametrize("how", ["cut", "garbage", "gone"])
def test_damaged_statistics_are_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, how: str
) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    want = moments(study_of(tiny("llama"), persistent=True))
    path = next((tmp_path / "calibration").iterdir()) / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if how == "cut" else b"\xff" * 300)
    assert same(moments(study_of(tiny("llama"), persistent=True)), want)
    mended = study_of(tiny("llama"), persistent=True)
    monkeypatch.setattr(mended, "block_runner", None)
    assert same(moments(mended), want) and not mended.notes


def test_two_who_calibrate_at_once_do_not_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    one, two = (study_of(tiny("llama"), persistent=True) for _ in range(2))
    pairs = list(zip(one.inputs(hessians=True), two.inputs(hessians=True), strict=True))
    assert len(pairs) == 3 and not one.notes and not two.notes
    assert len(list((tmp_path / "calibration").iterdir())) == 1
    monkeypatch.setattr(one, "block_runner", None)
    assert len(moments(one)) == len(moments(two))


def test_other_texts_make_other_copies(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("A text of one's own, long enough for some stretches of a few tokens each. " * 20)
    session = wb.Session((tiny("llama"), byte_tokenizer))
    before = session.calibrate(SHIPPED, samples=2, tokens=32)
    assert session.calibrate() is before
    after = session.calibrate(path, samples=2, tokens=32)
    assert not torch.equal(before.ids, after.ids)
    variants = Variants(session.model, byte_tokenizer)
    made = variants.get([RTN()])
    assert variants.get([RTN()]) is made
    variants.calibrate(Calibration(SAMPLED))
    assert variants.get([RTN()]) is not made


# --- Texts


@pytest.mark.parametrize("source", [SHIPPED, PYTHON])
def test_texts_come_in_even_stretches(
    tiny_llama: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, source: str
) -> None:
    calibration = Calibration(source, samples=4, tokens=16)
    ids = calibration.ids(tiny_llama, byte_tokenizer)
    whole = byte_tokenizer(calibration.text(), add_special_tokens=False)["input_ids"]
    assert ids.shape == (4, 16)
    assert ids[0].tolist() == whole[:16] and ids[-1].tolist() == whole[-16:]


def test_the_shipped_text_is_long_enough_for_its_defaults(default_tokens: Callable[[str], int]) -> None:
    assert default_tokens(Calibration().text()) >= Calibration().samples * Calibration().tokens


@pytest.fixture(scope="module")
def default_tokens() -> Callable[[str], int]:
    """A lower estimate of a text's tokens: usual vocabularies take at least one a word."""
    return lambda text: len(text.split())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_data_sets_are_read_by_their_ending(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    path, rows = tmp_path / f"own{suffix}", ["First text.", "Second text, with ümlauts."]
    if suffix == ".txt":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    else:
        pd.DataFrame({"text": rows}).to_parquet(path)
    assert Calibration(str(path)).text() == "\n\n".join(rows)


def test_what_cannot_be_read_is_refused_at_once(
    tiny_llama: PreTrainedModel, byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    session = wb.Session((tiny_llama, byte_tokenizer))
    with pytest.raises(InputError, match="No such file"):
        session.calibrate(tmp_path / "nothing.txt")
    (tmp_path / "odd.jsonl").write_text('{"words": "no text"}\n')
    with pytest.raises(InputError, match="KeyError"):
        session.calibrate(tmp_path / "odd.jsonl")
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(InputError, match="fewer than one stretch"):
        session.calibrate(tmp_path / "short.txt").ids  # noqa: B018
    with pytest.raises(BadParameter, match="at least 8"):
        session.calibrate(SHIPPED, tokens=4)


def test_without_a_tokenizer_the_model_speaks_for_itself(tiny_llama: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    one, two = (Calibration(samples=3, tokens=12, seed=seed).ids(tiny_llama, None) for seed in (0, 1))
    assert one.shape == (3, 12) and not torch.equal(one, two)
    assert torch.equal(one, Calibration(samples=3, tokens=12).ids(tiny_llama, None))
    assert torch.equal(torch.get_rng_state(), state)
