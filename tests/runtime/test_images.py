"""Prompts with images: read by the model's own processor, exact, and known to the methods that are about images."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from tests.seeing import IMAGE, pictures, seeing
from workbench.cli import main
from workbench.engine.images import unchanged
from workbench.errors import BadPrompt, NotApplicable

EXACT = ("Llava", "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Idefics3")
TEXT = "look <image> and <image> there"


@pytest.fixture(scope="module")
def seers() -> dict[str, tuple[Any, Any]]:
    return {}


@pytest.fixture
def session(seers: dict[str, tuple[Any, Any]]) -> Any:
    """A session with a model of a kind, each built once."""

    def of(kind: str, **options: Any) -> wb.Session:
        if kind not in seers:
            seers[kind] = seeing(kind)
        return wb.Session(seers[kind], kv_dtype="float32", **options)

    return of


def generated(session: wb.Session, question: str | None, new: int) -> list[int]:
    """What transformers generates after the prompt that was read, and a question."""
    assert session.trace is not None and session.trace.prompt.images is not None
    prompt, model = session.trace.prompt, session.model
    ids = torch.cat([prompt.ids, prompt.question_ids(question, session.tokenizer)])
    inputs = dict(prompt.images.inputs) if prompt.images else {}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = torch.nn.functional.pad(inputs[name], (0, ids.numel() - prompt.ids.numel()))
    with unchanged(model):
        said: Any = model.generate(  # type: ignore[operator]
            ids[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=new, do_sample=False, **inputs
        )
    return [int(token) for token in said[0, ids.numel() :]]


@pytest.mark.parametrize("kind", EXACT)
def test_images_are_read_as_generate_reads_them(kind: str, session: Any) -> None:
    seer = session(kind)
    prompt = seer.read(TEXT, images=pictures()).prompt
    assert prompt.images.mask.equal(prompt.ids == IMAGE) and len(prompt.images.counts) == 2
    turned = prompt.images.coordinates
    assert (turned is not None) == kind.startswith("Qwen")
    if turned is not None:
        assert int(turned.max()) + 1 < prompt.ids.numel()  # images take fewer positions than tokens
    for question in (None, "what?"):
        run = seer.run("full", question=question, max_new_tokens=6)
        assert list(run.tokens) == generated(seer, question, 6)
    assert seer.run("snapkv", budget=1.0, question="what?", max_new_tokens=4).quality.kl < 1e-6
    assert getattr(seer.model.model, "rope_deltas", None) is None  # nothing is left on the model


def test_later_turns_and_kept_entries_stand_where_images_moved_them(session: Any) -> None:
    seer = session("Qwen2VL")
    seer.read(TEXT, images=pictures())
    run = seer.run("snapkv", budget=0.5, question="what?", max_new_tokens=5)
    stepped = seer.run("streaming-llm", budget=1.0, question="what?", max_new_tokens=5)
    assert list(stepped.tokens) == list(seer.run("full", question="what?", max_new_tokens=5).tokens)
    assert run.to_dict(quality=False)["kv_share"] <= 0.5


@pytest.mark.parametrize("kind", ["Llava", "Qwen2VL"])
def test_pieces_of_a_prompt_see_their_images(kind: str, session: Any) -> None:
    """A chunked prefill with room for everything ends as the reading of the whole did."""
    seer = session(kind)
    trace = seer.read(TEXT * 2, images=pictures(2) * 2)
    assert torch.allclose(seer.plan("streammem", budget=1.0).logits, trace.logits, atol=1e-4)
    seer.read(TEXT * 2, images=pictures(2) * 2, record=False)
    assert torch.allclose(seer.plan("streammem", budget=1.0).logits, trace.logits, atol=1e-4)
    assert seer.run("streammem", budget=0.5, merging=False, max_new_tokens=3).tokens


def test_models_that_add_to_images_between_layers_are_read_whole(session: Any) -> None:
    seer = session("Qwen3VL")
    seer.read(TEXT, images=pictures())
    with pytest.raises(NotApplicable, match="between its layers"):
        seer.plan("streammem", budget=0.5)


def test_what_sees_ahead_within_an_image_is_refused(session: Any) -> None:
    with pytest.raises(NotApplicable, match="attends to later tokens too") as caught:
        session("Gemma3").read(TEXT, images=pictures())
    assert "\n" not in str(caught.value)
    session("Gemma3").read("only words")


def test_keys_of_images_are_not_turned_by_their_places(session: Any) -> None:
    seer = session("Qwen2VL")
    seer.read(TEXT, images=pictures())
    with pytest.raises(NotApplicable, match="M-RoPE"):
        seer.run("cskv", budget=0.5, max_new_tokens=2)
    with pytest.raises(NotApplicable, match="repeated"):
        seer.plan("kvzip", budget=0.5)
    with pytest.raises(NotApplicable, match="images are not"):
        seer.plan("epicache", budget=0.5)


def test_look_m_evicts_image_tokens_first(session: Any) -> None:
    seer = session("Llava")
    trace = seer.read(TEXT, images=pictures())
    mask = trace.prompt.images.mask
    plan = seer.plan("look-m", budget=1 - int(mask.sum()) / trace.tokens + 0.02, recent_share=0.0)
    assert not bool((plan.tiers[:, :, mask] > 0).any())
    told = seer.plan("look-m", budget=0.5, recent_share=0.0, image_spans="0-1")
    assert not torch.equal(told.tiers, seer.plan("look-m", budget=0.5, recent_share=0.0).tiers)


def test_calibquant_takes_the_images_stretch(session: Any) -> None:
    seer = session("Llava")
    trace = seer.read(TEXT, images=pictures())
    first, end = trace.layers[0].image_span
    assert trace.prompt.images.mask[first] and trace.prompt.images.mask[end - 1]
    here = seer.run("vkv-1bit", max_new_tokens=4)
    same = seer.run("vkv-1bit", start=first, length=end - first, max_new_tokens=4)
    assert here.kv_nbytes == same.kv_nbytes and here.tokens == same.tokens


def test_video_methods_take_frames_from_images(session: Any) -> None:
    seer = session("Llava")
    trace = seer.read(TEXT, images=pictures())
    images = trace.prompt.images
    method: Any = wb.method("streammem", frame=32)
    assert method.frame_of(64, 16, trace.prompt) == max(images.counts) < method.frame_of(64, 16)
    before = int(images.mask.nonzero()[0])
    plan = seer.plan("livevlm", budget=0.6, sinks=0, piece=4)
    assert bool((plan.tiers[:, :, :before] > 0).all())  # what stands before the first image


def test_a_chat_may_hold_images_in_its_parts(session: Any) -> None:
    seer = session("Llava")
    one, two = pictures()
    parts = [
        {"type": "image"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": two},
        {"type": "text", "text": "?"},
    ]
    got = seer.read([{"role": "user", "content": parts}], images=[one])
    marked = seer.read("<image>and<image>?", images=[one, two])
    assert torch.equal(got.ids, marked.ids) and torch.equal(got.logits, marked.logits)
    before = seer.read("and?", images=[one])
    assert int(before.prompt.images.mask.nonzero()[0]) == len("<user>")
    plain = seer.read("a <image> b", images=[one], chat=False)
    assert plain.ids.tolist() == seer.tokenizer("a ")["input_ids"] + [IMAGE] * 4 + seer.tokenizer(" b")["input_ids"]


def test_images_come_as_files_arrays_or_images(session: Any, tmp_path: Path) -> None:
    seer, image = session("Llava"), pictures(1)[0]
    Image.fromarray(image).save(tmp_path / "one.png")
    logits = [
        seer.read("see", images=[given]).logits
        for given in (
            image,
            Image.fromarray(image),
            tmp_path / "one.png",
            str(tmp_path / "one.png"),
            torch.tensor(image),
        )
    ]
    assert all(torch.equal(each, logits[0]) for each in logits)
    (tmp_path / "text.png").write_text("no image")
    whole = io.BytesIO()
    Image.fromarray(image).save(whole, "PNG")
    (tmp_path / "cut.png").write_bytes(whole.getvalue()[:200])
    for given, said in {
        "https://example.com/a.png": "nothing is fetched",
        "data:image/png;base64,AAAA": "nothing is fetched",
        str(tmp_path / "none.png"): "No such file",
        str(tmp_path / "text.png"): "no image",
        str(tmp_path / "cut.png"): "image 1",
        str(tmp_path): "directory",
    }.items():
        with pytest.raises(BadPrompt, match=said) as caught:
            seer.read("see", images=[given])
        assert "\n" not in str(caught.value)
    for wrong in (image.astype(np.float32), image[..., :2], np.full((4, 4), 300), 7):
        with pytest.raises(BadPrompt, match="image 1 is a"):
            seer.read("see", images=[wrong])


def test_what_does_not_fit_is_refused_in_one_line(session: Any) -> None:
    seer, images = session("Llava"), pictures()
    for text, given, said in (
        ("<image> a", images, "1 marks"),
        ("spells <unused270>", images, "steers the model"),
        ([{"role": "user", "content": "a"}], images, "no place for 2 of 2"),
        ([{"role": "user", "content": [{"type": "image"}]}], images[:1], "without words"),
        ([1, 2, 3], images, "not with token ids"),
    ):
        with pytest.raises(BadPrompt, match=said) as caught:
            seer.read(text, images=given)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadPrompt, match="this session has none"):
        wb.Session((seer.model, seer.tokenizer)).read("a", images=images)


def test_saved_sessions_keep_their_images(session: Any, tmp_path: Path) -> None:
    seer = session("Qwen2VL")
    seer.read(TEXT, images=pictures())
    again: Any
    want = seer.run("full", question="what?", max_new_tokens=5).tokens
    seer.save(tmp_path / "saved")
    again = wb.Session.load(tmp_path / "saved", model=(seer.model, seer.readings.processor))
    assert again.run("full", question="what?", max_new_tokens=5).tokens == want
    one, other = (each.trace.prompt.images for each in (again, seer))
    assert one.labels() == other.labels() and one.labels()[int(one.mask.nonzero()[0])] == "[image 1, 1]"
    assert again.run(["rtn"], max_new_tokens=2).tokens  # which reads the prompt again, by other weights


def test_a_folder_with_a_processor_reads_images_from_the_command_line(
    session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seer, image = session("Llava"), pictures(1)[0]
    folder = tmp_path / "llava"
    seer.model.save_pretrained(folder)
    seer.readings.processor.save_pretrained(folder)
    Image.fromarray(image).save(tmp_path / "one.png")
    seer.read("see <image> there", images=[image])
    want = seer.run("snapkv", budget=0.5, question="what?", max_new_tokens=4)
    asked = ["run", "snapkv", "--budget", "0.5", "--model", str(folder), "--image", str(tmp_path / "one.png")]
    asked += ["--text", "see <image> there", "--question", "what?", "--max-new-tokens", "4", "--kv-dtype", "float32"]
    assert main([*asked, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == list(want.tokens)
    assert main(["run", "--model", str(folder), "--image", "none.png", "--text", "see"]) == 2
    assert "image 1: cannot read" in capsys.readouterr().err


def test_a_difference_from_generate_is_refused(session: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where a model would place what follows its images elsewhere than is seen here."""
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    seer = session("Qwen2VL")
    monkeypatch.setattr("workbench.engine.images._coordinates", lambda _: None)
    with pytest.raises(NotApplicable, match="decoding a prompt with images"):
        seer.read(TEXT, images=pictures())
