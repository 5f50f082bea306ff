"""Methods of other packages: found, described, checked; and what becomes of broken ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from workbench.attention.base import AttentionMethod
from workbench.kv import SnapKV
from workbench.kv.base import KVMethod, Study
from workbench.kv.ranking import Ranking
from workbench.kv.stores.format import Format, PackedFormat, Shape
from workbench.registry import Method, param
from workbench.testing import (
    MethodProblem,
    check_method,
    check_promise,
    nothing_is_left_on_the_method_the_model_or_the_trace,
)
from workbench.trace import LayerTrace

GUIDE = Path(__file__).parent.parent / "docs" / "plugin.md"


def python(*arguments: str, site: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the packages in `site` installed beside ours."""
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": path},
        cwd=site,
        capture_output=True,
        text=True,
    )


def installed(site: Path, package: str, code: str, point: str) -> None:
    """A package of one module, as an installer leaves it."""
    site.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[workbench.methods]\n{point} = {module}:Chosen\n")


def module(key: str, *, decorated: bool = False) -> str:
    return f'''
from workbench.kv.methods.evict.knorm import Knorm
from workbench.registry import register

{"@register" if decorated else ""}
class Chosen(Knorm):
    """Choose."""

    key = "{key}"
'''


# -- the guide


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide's package, built into a wheel and installed."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    files = dict(re.findall(r"^`([\w.]+)`[^\n]*\n\n```\w+\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL))
    assert set(files) == {"vnorm.py", "pyproject.toml", "test_vnorm.py"}
    assert len(files["vnorm.py"].splitlines()) <= 20
    for name, text in files.items():
        (source / name).write_text(text)
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel"],
        check=False,
        cwd=source,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "test_vnorm.py").write_text(files["test_vnorm.py"])
    return site


def test_an_installed_plugin_is_a_method_like_any_other(guide: Path) -> None:
    script = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
sys.modules["pytest"] = None  # check_method does without
import torch, workbench as wb
from workbench.models import tiny
from workbench.registry import find
row = wb.methods("kv").set_index("key").loc["vnorm"]
assert row["summary"].startswith("Keep the positions with the longest values") and row["parameters"] == "recent=16"
(recent,) = find("vnorm").parameters()
assert (recent.kind, recent.low, recent.high, recent.unit, recent.default) == ("int", 0, 4096, "tokens", 16)
session = wb.Session((tiny(), None))
session.read(torch.arange(60))
assert session.plan("vnorm", budget=0.5).kept(0, 0).tolist()[-16:] == list(range(44, 60))
recipe = [wb.method("vnorm", budget=0.5, recent=4), "adakv", wb.method("kivi", group=8, residual=8)]
assert len(session.run(recipe, question=[1, 2], max_new_tokens=3).tokens) == 3
from workbench.testing import check_method
check_method(find("vnorm"), recent=8)
print("used")
"""
    done = python("-c", script, site=guide)
    assert done.stdout.strip() == "used", done.stderr


def test_the_guides_own_test_passes(guide: Path) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(guide), "test_vnorm.py", site=guide)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


# -- what can be wrong with a plugin


def test_a_broken_plugin_is_left_out_with_a_warning(tmp_path: Path) -> None:
    site = tmp_path / "site"
    installed(site, "fine-plugin", module("fine"), "fine")
    installed(site, "gone-plugin", "import nothing_of_this_name", "gone")
    installed(site, "odd-plugin", "Chosen = 5", "odd")
    installed(site, "bare-plugin", module(""), "bare")
    installed(site, "bold-plugin", module("snapkv"), "bold")
    script = """
import warnings
from workbench.registry import find, registered
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    keys = [cls.key for cls in registered()]
assert "fine" in keys and keys.count("snapkv") == 1 and find("snapkv").__module__ == "workbench.kv.methods.evict.snapkv"
print(*sorted(str(w.message) for w in caught if "plugin" in str(w.message)), sep="\\n")
"""
    done = python("-c", script, site=site)
    bare, bold, gone, odd = done.stdout.splitlines() or [done.stderr] * 4
    assert bare.startswith("the plugin bare-plugin 1.0 (bare_plugin:Chosen) cannot be used: Chosen needs a key"), bare
    assert bold.startswith("the plugin bold-plugin 1.0 ") and "under the key 'snapkv'" in bold
    assert gone.startswith("the plugin gone-plugin 1.0 ") and "nothing_of_this_name" in gone
    assert odd.startswith("the plugin odd-plugin 1.0 ") and "5 is not a subclass" in odd


@pytest.mark.parametrize("decorated", [False, True])
def test_two_plugins_under_one_key_are_an_error_that_names_both(tmp_path: Path, decorated: bool) -> None:
    site = tmp_path / "site"
    installed(site, "one-plugin", module("same", decorated=decorated), "same")
    installed(site, "other-plugin", module("same", decorated=decorated), "same")
    done = python("-m", "workbench", "methods", site=site)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    message = " ".join(done.stderr.split())
    assert "two plugins offer a method under the key 'same'" in message
    assert "one-plugin 1.0 (one_plugin:Chosen)" in message and "other-plugin 1.0 (other_plugin:Chosen)" in message


# -- check_method


class Sound(KVMethod):
    """Keep the longest keys."""

    key = "sound"
    title = "Sound"
    claim = "none"
    default_budget = 0.5

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.keys.float().norm(dim=-1)


class Undescribed(Sound):
    """Take a parameter without bounds."""

    width: int = param(3, help="of something")


class ScoresQueryHeads(Sound):
    """Score each query head."""

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.queries.float().norm(dim=-1)


class ScoresInSixteenBits(Sound):
    """Score in the model's precision."""

    def score(self, layer: LayerTrace) -> Tensor:
        return layer.keys.norm(dim=-1)


class NeedsFiveTokens(Sound):
    """Score by the fifth best."""

    def score(self, layer: LayerTrace) -> Tensor:
        scores = super().score(layer)
        return scores - scores.topk(5).values[:, -1:]


class Dices(Sound):
    """Score at random."""

    def score(self, layer: LayerTrace) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        return torch.rand(layer.kv_heads, layer.tokens, generator=generator)


class Reseeds(Sound):
    """Score at random, the same way every time."""

    def score(self, layer: LayerTrace) -> Tensor:
        torch.manual_seed(layer.index)
        return torch.rand(layer.kv_heads, layer.tokens)


class Remembers(Sound):
    """Look at how often it was asked."""

    asked: ClassVar[list[int]] = []

    def score(self, layer: LayerTrace) -> Tensor:
        self.asked.append(layer.tokens)
        return super().score(layer)


class WritesOnTheModel(Sound):
    """Leave a note on the model."""

    def scores(self, study: Study) -> Tensor:
        study.reader(self.key).note = "seen"  # type: ignore[assignment]
        return torch.stack([self.score(layer) for layer in study.trace.compressible])


class WritesOnTheTrace(Sound):
    """Normalise the keys in place."""

    def score(self, layer: LayerTrace) -> Tensor:
        with torch.inference_mode():
            return layer.keys_held.div_(2).float().norm(dim=-1)


class GivesNothing(Sound):
    """Give some heads nothing."""

    head_adaptive = True

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        counts = super().allocate(ranking, entries)
        counts[0, 0] = 0 if entries < ranking.scores.numel() else counts[0, 0]
        return counts


class HidesThatHeadsDiffer(Sound):
    """Give the first head a little more."""

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        counts = super().allocate(ranking, entries)
        if ranking.kv_heads > 1 and int(counts[0, -1]) > 1 and entries < ranking.scores.numel():
            counts[0, 0] += 1
            counts[0, -1] -= 1
        return counts


class OverdrawsTheBudget(Sound):
    """Give every head one more than there is."""

    def allocate(self, ranking: Ranking, entries: int) -> Tensor:
        return (super().allocate(ranking, entries) + 1).clamp(max=ranking.tokens)


class NeverExact(Sound):
    """Store four bits whatever the budget."""

    def store(self, dtype: torch.dtype, shapes: Sequence[Shape], limit: int | None) -> Format:
        return PackedFormat(dtype, 4, 8, 8)


class MergesWithoutNeed(Sound):
    """Smooth the values."""

    def merge(self, layer: LayerTrace, kept: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return layer.keys, (layer.values + layer.values.roll(1, dims=1)) / 2


class NarrowsAtAnyBudget(AttentionMethod):
    """Let every layer see 8 tokens."""

    key = "narrow"
    title = "Narrow"
    claim = "none"

    def span(self, layer: int, layers: int, tokens: int) -> int | None:
        return 8


BROKEN = {
    Undescribed: "describes itself: the parameter width needs bounds",
    ScoresQueryHeads: "shape|size|scores are",
    ScoresInSixteenBits: "a bfloat16 model is scored in float32",
    NeedsFiveTokens: "prompts of few tokens work: RuntimeError",
    Dices: "another prompt in between changes|the same prompt gives the same plan",
    Reseeds: "the global random state changed",
    Remembers: "nothing is left .* the method remembers",
    WritesOnTheModel: "nothing is left .* the model's attributes changed",
    WritesOnTheTrace: "nothing is left .* the trace changed",
    GivesNothing: "keeps nothing|a head gets 0",
    HidesThatHeadsDiffer: "heads of a layer get different lengths: set head_adaptive = True",
    OverdrawsTheBudget: "are given out|smallest",
    NeverExact: "a whole budget is exact",
    MergesWithoutNeed: "where nothing was dropped there is nothing to merge",
    NarrowsAtAnyBudget: "a whole budget attends exactly",
}


def test_a_sound_method_keeps_every_promise() -> None:
    check_method(Sound)


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_a_broken_promise_is_named(cls: type[Method]) -> None:
    with pytest.raises(MethodProblem, match=BROKEN[cls]) as problem:
        check_method(cls)
    assert str(problem.value).startswith(cls.key) and isinstance(problem.value, AssertionError)


def test_what_is_no_method_is_refused() -> None:
    with pytest.raises(MethodProblem, match="derives from one of KVMethod, WeightMethod, AttentionMethod"):
        check_method(Method)
    with pytest.raises(TypeError, match="leave `budget` out"):
        check_method(SnapKV, budget=0.5)
    with pytest.raises(MethodProblem, match="window"):
        check_method(SnapKV, window=0)


FORGETFUL = '''
from collections import OrderedDict
from functools import cache
from weakref import WeakKeyDictionary

from tests.test_plugins import Sound

{state}


class Chosen(Sound):
    """Look up what was measured before."""

    key = "remembering"

    def score(self, layer):
        scores = super().score(layer)
        {use}
        return scores
'''


@pytest.mark.parametrize(
    ("state", "use"),
    [
        ("seen = WeakKeyDictionary()", "seen.setdefault(layer, scores)"),
        ("seen = OrderedDict()", "seen[layer.tokens] = scores"),
        ("seen = []", "seen.append(layer.tokens)"),
        ("class Seen:\n    layers = {}", "Seen.layers[layer.index] = scores"),
        ("class Seen:\n    pass\nSEEN = Seen()", "SEEN.last = layer.tokens"),
        ("last = None", "global last; last = layer.tokens"),
        ("def look(layer, seen=[]):\n    seen.append(layer.tokens)", "look(layer)"),
        ("@cache\ndef total(layer):\n    return float(layer.keys.sum())", "total(layer)"),
    ],
    ids=lambda value: value.split("\n")[0] if value.startswith(("seen", "class", "last =", "def", "@")) else "",
)
def test_what_a_module_remembers_is_a_broken_promise(state: str, use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("forgetful_plugin")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(FORGETFUL.format(state=state, use=use), vars(made))
    with pytest.raises(MethodProblem, match=r"nothing is left .* modules remember something between uses: forgetful_p"):
        check_promise(nothing_is_left_on_the_method_the_model_or_the_trace, made.Chosen)


def test_what_modules_compute_of_plain_values_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = types.ModuleType("forgetful_plugin")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    state = "import torch\n@cache\ndef ramp(size):\n    return torch.arange(size)"
    exec(FORGETFUL.format(state=state, use="scores = scores + 0 * ramp(layer.tokens)"), vars(made))
    check_promise(nothing_is_left_on_the_method_the_model_or_the_trace, made.Chosen)


@pytest.mark.parametrize(("former", "name"), [("watch", "update_state"), ("evidence", "eviction_state")])
def test_a_stage_under_a_former_name_is_refused_with_the_name_it_has(former: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"defines `{former}`, which is called `{name}` now"):
        type("Old", (KVMethod,), {former: lambda self, *given: None, "__module__": __name__})
