"""KVzip."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workbench.core.across_devices import stacked
from workbench.core.attention_rows import row_blocks
from workbench.engine.attention_hook import forward
from workbench.errors import NotApplicable
from workbench.kv.base import Study, keep_first
from workbench.kv.global_heads import GlobalHeads
from workbench.models import max_positions
from workbench.progress import Progress
from workbench.prompt import Prompt
from workbench.registry import Fidelity, Paper, Preset, param, register
from workbench.trace import LayerTrace, Trace
from workbench_kernels import Scoring

_CUE = 8  # tokens of the piece before, from which the model is asked to go on


@register
class KVzip(GlobalHeads):
    """Keep what the model needs to repeat its context from the cache, whatever will be asked.

    After the prompt the model is shown, piece by piece, an instruction to repeat the context and then the context's
    own tokens; a pair's score is the most attention that any query of its piece's pass, of any head of its group, pays
    to it (section 3.2). As in the authors' code the softmax of a score runs over the first `sinks`
    positions, the piece and the pass's own tokens only, which makes the cost linear in the context, while what the
    model computes attends to the whole cache. Room is shared by one threshold over all layers and heads.

    Chosen here: the instruction's words; the first `sinks` positions always stay, in place of the paper's system
    prompt; the instruction closes the open turn with the chat template where the prompt has one; passes stand at the
    positions after the prompt. A session without a tokenizer has no words for an instruction: there each piece follows
    the last tokens of the one before, and the model is left to continue. Costs about two readings of the prompt, once;
    any budget is then immediate.
    """

    key = "kvzip"
    title = "KVzip"
    paper = Paper(
        "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", "Kim et al. 2025", "2505.23416"
    )
    claim = "3-4x smaller cache, reusable over many queries, about 2x faster decoding"
    fidelity = Fidelity("as published")
    presets = (
        Preset("code", "snu-mllab/KVzip, model/wrapper.py and attention/score.py, 5d84729", chunk=2000, heads="global"),
        Preset("uniform", "snu-mllab/KVzip, attention/score.py, _threshold_uniform, 5d84729", heads="equal"),
        Preset("kvpress", "NVIDIA/kvpress, presses/kvzip_press.py, 8bb29b9", sinks=4, heads="global"),
    )
    default_budget = 0.5

    chunk: int = param(2000, ge=16, le=16384, unit="tokens", help="how much of the context is repeated in one pass")
    sinks: int = param(4, ge=0, le=256, unit="tokens", help="positions at the start that always stay")

    def scores(self, study: Study) -> Tensor:
        trace, model = study.trace, study.reader(self.key)
        if trace.prompt.images is not None:
            raise NotApplicable(
                "kvzip has the model repeat the prompt, and images cannot be repeated; use another method"
            )
        if not trace.compressible:
            return torch.zeros(0, trace.kv_heads, trace.tokens)
        starts = range(0, trace.tokens, self.chunk)
        pieces = [slice(start, min(start + self.chunk, trace.tokens)) for start in starts]
        passes = [torch.cat([_instruction(trace.prompt, piece.start), trace.ids[piece]]) for piece in pieces]
        longest = trace.tokens + max(ids.numel() for ids in passes)
        most = max_positions(model)
        if longest > most:
            raise NotApplicable(
                f"kvzip repeats the prompt in pieces after it, up to position {longest:,}, but the model has only "
                f"{most:,}; use a smaller chunk or a shorter prompt"
            )
        scores = []
        for done, (piece, ids) in enumerate(zip(pieces, passes, strict=True)):
            repeating = _Repeating(trace, piece, self.sinks, study.progress, done, len(pieces))
            positions = torch.arange(trace.tokens, trace.tokens + ids.numel())
            states = None if trace.states is None else trace.states.on(self.key)
            forward(model, repeating, ids, positions, cache=states)
            scores.append(stacked([repeating.scores[layer.index] for layer in trace.compressible]))
        study.progress.update("repeating the context", len(trace.layers) * len(pieces), len(trace.layers) * len(pieces))
        return stacked([keep_first(layer, self.sinks) for layer in torch.cat(scores, dim=2)])  # [l, k, n]


def _instruction(prompt: Prompt, start: int) -> Tensor:
    """The ids that ask for the context from position `start` on."""
    cue = prompt.ids[max(start - _CUE, 0) : start]
    tokenizer = prompt.tokenizer
    if tokenizer is None:
        return cue
    before = str(tokenizer.decode(cue, skip_special_tokens=True)).strip()
    words = f"Repeat the previous context starting with: {before}" if before else "Repeat the previous context:"
    return prompt.question_ids(words if prompt.chat else f"\n\n{words}\n", tokenizer)


class _Repeating:
    """One pass over an instruction and a piece of the context, attending to the recorded prompt and to itself.

    scores: of each compressible layer, the most attention that the piece's positions received, float32 [k, p].
    """

    def __init__(self, trace: Trace, piece: slice, sinks: int, progress: Progress, done: int, pieces: int) -> None:
        self.trace, self.piece, self.progress = trace, piece, progress
        self.sinks = slice(0, min(sinks, piece.start))
        self.done, self.pieces = done, pieces
        self.scores: dict[int, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        layers = len(self.trace.layers)
        self.progress.update("repeating the context", self.done * layers + layer, self.pieces * layers)
        recorded = self.trace.layers[layer]
        scored = layer not in self.trace.exact
        keys = torch.cat([recorded.keys, key], dim=1)  # [k, n + q, d]
        values = torch.cat([recorded.values, value], dim=1)
        out = torch.empty(*query.shape[:2], value.shape[-1], dtype=query.dtype, device=query.device)
        best = torch.zeros(key.shape[0], self.piece.stop - self.piece.start, device=query.device)
        # The window is the one the prompt was read with, the model's or an attention method's.
        for block in row_blocks(query, keys, replace(recorded.scoring, chosen=scoring.chosen)):
            rows = block.probs.unflatten(0, (key.shape[0], -1))  # [k, g, rows, keys]
            mixed = rows.flatten(1, 2).to(values.dtype) @ values[:, block.keys]
            out[:, block.rows] = mixed.view(query.shape[0], -1, values.shape[-1])
            if scored:
                best = torch.maximum(best, self._most(rows, recorded))
        if scored:
            self.scores[layer] = best
        return out

    def _most(self, rows: Tensor, recorded: LayerTrace) -> Tensor:
        """The largest weight [k, p] on each position of the piece, as if only sinks, piece and the pass were there."""
        piece = rows[..., self.piece]
        total = rows[..., recorded.tokens :].sum(dim=-1) + piece.sum(dim=-1) + rows[..., self.sinks].sum(dim=-1)
        if recorded.scoring.sinks is not None:
            total = total + (1 - rows.sum(dim=-1))  # learned ones are there too
        shares = piece / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]  # [k, g, rows, p]
        return shares.amax(dim=(1, 2))
