"""Training `workbench-tiny` for a given time."""

from __future__ import annotations

import json
import math
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from training.architecture import CONTEXT, new_model
from training.corpus import Corpus
from training.mixture import Batches, stage_at
from training.tasks import WEIGHTS
from training.vocabulary import chat_tokenizer
from workbench.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP = 200  # steps
_DECAY = 0.45  # share of the time, at the end, over which the learning rate falls to nothing
_SAVE_EVERY = 60  # seconds
_SAY_EVERY = 5  # seconds


def learning_rate(peak: float, step: int, share: float) -> float:
    """Linear warm-up by steps, then constant, then a cosine to zero over the last part of the time."""
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, (share - 1 + _DECAY) / _DECAY))))
    return peak * min(1.0, (step + 1) / _WARM_UP) * falling


def weighted_loss(model: PreTrainedModel, ids: Tensor, worth: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean cross-entropy of ids [b, n], weighted by what each is worth [b, n]; also each loss and each weight."""
    decoder: Any = model.get_decoder()
    hidden = decoder(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden)  # [b, n - 1, vocabulary]
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    each = weights[worth[:, 1:].flatten().long()]
    return (losses * each).sum() / each.sum(), losses.detach(), worth[:, 1:].flatten()


def train(
    corpus: Corpus,
    out: Path,
    minutes: float,
    *,
    seed: int = 0,
    batch_tokens: int = 65_536,
    peak: float = 3e-3,
    workers: int = 12,
    compiled: bool = False,
    shape: dict[str, int] | None = None,
) -> dict[str, Any]:
    """Train from nothing for `minutes` and save model and tokenizer to `out` (bfloat16), now and then and at the end.

    shape: passed on to `new_model`. Returns how it went: steps, tokens, seconds, losses on the way. On a GPU with
    bfloat16 products; the same seed gives other weights on another machine, since the time decides the steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = corpus.tokenizer
    model: Any = new_model(tokenizer.get_vocab_size(), seed=seed, **(shape or {})).to(device)  # type: ignore[arg-type]
    model.train()
    if compiled:
        for layer in model.get_decoder().layers:
            layer.compile(dynamic=False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
        fused=device.type == "cuda",
    )
    weights = torch.tensor(WEIGHTS, device=device)
    batches = Batches(corpus, batch_tokens, seed, workers, pinned=device.type == "cuda")
    history: list[dict[str, float]] = []
    steps = tokens = 0
    sums = torch.zeros(2, len(WEIGHTS), device=device)
    started = said = saved = 0.0
    for batch in batches:
        if not steps:  # the clock runs from the first batch on: processes take their time to start
            started = said = saved = time.monotonic()
        share = (time.monotonic() - started) / (60 * minutes)
        if share >= 1:
            break
        batches.stage = stage_at(share)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, steps, share)
        ids = batch[0].to(device, torch.long, non_blocking=True)
        worth = batch[1].to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, losses, kinds = weighted_loss(model, ids, worth, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        one_hot = functional.one_hot(kinds.long(), len(WEIGHTS)).float()
        sums += torch.stack([losses @ one_hot, one_hot.sum(dim=0)])
        steps, tokens = steps + 1, tokens + ids.numel()
        now = time.monotonic()
        if now - said > _SAY_EVERY or steps == 1:
            means = (sums[0] / sums[1].clamp(min=1)).tolist()
            sums.zero_()
            history.append({"share": share, "tokens": tokens, "text": means[2], "answer": means[3]})
            speed = tokens / (now - started)
            print(
                f"{now - started:6.0f} s  step {steps:6}  {tokens / 1e6:7.1f} M tokens  {speed:9.0f}/s"
                f"  length {ids.shape[1]:4}  context {means[1]:.3f}  text {means[2]:.3f}  answers {means[3]:.3f}",
                flush=True,
            )
            said = now
        if now - saved > _SAVE_EVERY:
            save(model, tokenizer, out)
            saved = now
    seconds = time.monotonic() - started
    save(model, tokenizer, out)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {
        "steps": steps,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "seed": seed,
        "batch_tokens": batch_tokens,
        "peak_learning_rate": peak,
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "history": history,
    }


def save(model: PreTrainedModel, tokenizer: Any, out: Path) -> None:
    """Model (rounded to bfloat16) and tokenizer as a folder that `workbench.Session` reads."""
    from transformers import LlamaForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        rounded: Any = LlamaForCausalLM(model.config)  # type: ignore[arg-type]
    state = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in model.state_dict().items()}
    rounded.load_state_dict(state, assign=True)
    rounded.tie_weights()
    rounded.config.dtype = torch.bfloat16
    with quiet():
        rounded.save_pretrained(out)
        chat_tokenizer(tokenizer, CONTEXT).save_pretrained(out)


def write_report(report: dict[str, Any], out: Path) -> None:
    """The report as JSON beside the weights."""
    (out / "evaluation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
