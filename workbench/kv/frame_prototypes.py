"""What a memory keeps of frames: their best entries, and one prototype of each that loses some."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.trace import LayerTrace


def chosen(scores: Tensor, room: int, new: int, frame: int) -> tuple[Tensor, Tensor]:
    """Which of the slots [k, m] stay as they are, and which take a frame's prototype; bool [k, m] each.

    scores [k, m]; the last `new` slots make frames of `frame` (0: none). Together they are `room` in each head: where a
    frame lost nothing and needs no prototype, one more slot stays.
    """
    heads, slots = scores.shape
    frames = -(-new // frame) if frame else 0
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, : room - frames], True)
    standing = torch.zeros_like(kept)
    if not frames:
        return kept, standing
    lost = pad(~kept[:, slots - new :], (0, frames * frame - new)).view(heads, frames, frame)
    sizes = torch.full((frames, 1), frame, device=scores.device)
    sizes[-1] = new - (frames - 1) * frame
    offset = (torch.arange(frame, device=scores.device) - (sizes - 1) / 2).abs()  # [f, w], from the middle
    nearest = torch.where(lost, offset, torch.inf).argmin(dim=-1, keepdim=True)
    prototypes = torch.zeros_like(lost).scatter_(2, nearest, lost.any(dim=-1, keepdim=True))
    standing[:, slots - new :] = prototypes.view(heads, -1)[:, :new]
    # Of what is left, the best fill the places of prototypes that are not needed.
    free = frames - standing.sum(dim=1, keepdim=True)
    taken = (kept | standing).gather(1, order)
    fill = ~taken & ((~taken).cumsum(dim=1) <= free)
    return kept | torch.zeros_like(kept).scatter_(1, order, fill), standing


def with_prototypes(
    layer: LayerTrace,
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    standing: Tensor,
    new: int,
    frame: int,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys [k, m, d] and values [k, m, dv] with the prototype of its frame in each slot of standing [k, m].

    scores [k, m] weigh; the last `new` slots, at positions [k or 1, m], make frames of `frame`.
    """
    heads, old = keys.shape[0], keys.shape[1] - new
    where = positions[:1, old:].expand(1, -1)[0].long()  # [f]: what has just been read is the same in all heads
    recent = keys[:, old:]
    if layer.rotary is not None:
        recent = layer.rotation.undo(recent, where)
    weights = scores[:, old:].clamp_min(torch.finfo(scores.dtype).tiny)
    frames = -(-new // frame)
    number = torch.arange(new, device=keys.device) // frame
    sums = torch.zeros(heads, frames, device=keys.device).index_add_(1, number, weights)
    weights = (weights / sums[:, number])[..., None]

    def means(x: Tensor) -> Tensor:
        sums = torch.zeros(heads, frames, x.shape[-1], device=x.device).index_add_(1, number, x * weights)
        return sums[:, number]  # [k, new, d]: at every slot what its frame's prototype would be

    merged = means(recent)
    if layer.rotary is not None:
        merged = layer.rotation.apply(merged, where)
    stands = standing[:, old:, None]
    keys = torch.cat([keys[:, :old], torch.where(stands, merged, keys[:, old:])], dim=1)
    values = torch.cat([values[:, :old], torch.where(stands, means(values[:, old:]), values[:, old:])], dim=1)
    return keys, values
