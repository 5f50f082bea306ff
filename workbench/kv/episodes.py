"""Episodes of a conversation: segments that are alike, and the one that a question is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from workbench.core.kmeans import kmeans
from workbench.engine.attention_hook import device_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Nearest(NamedTuple):
    """An episode: its number among all episodes, how many segments are its members, and its medoids, ascending."""

    number: int
    episodes: int
    members: int
    medoids: list[int]


def embedding(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The mean of the model's input embeddings of ids [n], of length 1, float64 [w] on the CPU."""
    with torch.no_grad():
        rows = model.get_input_embeddings()(ids.to(device_of(model)))  # [n, w]
    return normalize(rows.double().mean(dim=0), dim=0).cpu()


def nearest_episode(segments: Tensor, question: Tensor, episodes: int, medoids: int) -> Nearest:
    """Which of the episodes that k-means finds among embedded segments [s, w] has its centroid nearest a question [w].

    Its medoids are the segments, `medoids` at most, that are most like its centroid; likeness is the cosine.
    """
    centroids, members = kmeans(segments, episodes)
    number = int(cosine_similarity(centroids, question[None]).argmax())
    own = (members == number).nonzero()[:, 0]
    closeness = cosine_similarity(segments[own], centroids[number][None])
    nearest = own[closeness.argsort(descending=True, stable=True)[:medoids]].sort().values.tolist()
    return Nearest(number, len(centroids), len(own), nearest)
