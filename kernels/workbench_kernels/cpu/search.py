"""A beam search in a graph over keys, by the compiled library."""

from __future__ import annotations

from ctypes import CDLL

import torch
from torch import Tensor


def search(
    keys: Tensor, links: Tensor, entries: Tensor, query: Tensor, *, wanted: int, beam: int, together: int, library: CDLL
) -> tuple[Tensor, Tensor, Tensor]:
    """The `wanted` keys of largest inner product with each query [k, b, d] that a search finds which holds the best
    `beam` and follows the links of `together` at a time.

    keys float32 [k, m, d], links int32 [k, m, r] and entries int32 [k, e], -1 where there are fewer; all contiguous.
    Returns keys int64 [k, b, wanted], best first, m where fewer were found, their products, minus infinity there, and
    how many keys were looked at, int64 [k, b]. Raises MemoryError.
    """
    heads, count, width = keys.shape
    each, query = query.shape[1], query.contiguous()
    found = torch.empty(heads, each, wanted, dtype=torch.int64)
    scores, visited = torch.empty(heads, each, wanted), torch.empty(heads, each, dtype=torch.int64)
    threads = min(torch.get_num_threads(), heads * each)
    sizes = heads, each, count, width, links.shape[2], entries.shape[1], beam, together, wanted
    given = (x.data_ptr() for x in (keys, links, entries, query))
    if not library.wb_search(*given, *sizes, *(x.data_ptr() for x in (found, scores, visited)), threads):
        raise MemoryError(f"no memory to search a graph over {count:,} keys")
    return found, scores, visited
