"""What a stored row is: its columns, the key that tells rows apart, and the version of both.

A row is one recipe on one case of a task, with one model. What has no figure is NULL, and so is a figure that is not a
number. Lists and objects are JSON text. Bytes are live bytes; times are seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any, Literal

from workbench.errors import BadParameter
from workbench.files.strict_json import plain
from workbench.formatting import quoted

Row = dict[str, Any]
Kind = Literal["VARCHAR", "BIGINT", "DOUBLE", "BOOLEAN", "TIMESTAMP"]

VERSION = 1
STATUSES = ("done", "failed", "deleted")


@dataclass(frozen=True)
class Column:
    """A column: its type in DuckDB, and what it holds."""

    kind: Kind
    help: str


_TEXT: dict[str, str] = {
    "key": "tells rows apart: a hash of the model, recipe, case, settings and versions; the newest row of a key counts",
    "status": "done, failed (`error` says why) or deleted",
    "error": "why there is no figure, in one line",
    "study": "the name of the sweep, search or file that it comes from",
    "model": "the name, hub id or folder the model was loaded from",
    "model_fingerprint": "a hash of the model's config, weights and tokenizer",
    "recipe": "the recipe in short, as tables name it",
    "recipe_json": "the recipe, budget included, as `Recipe.from_dict` reads it",
    "kv": "keys of its KV methods, joined by +",
    "attention": "key of its attention method",
    "weights": "keys of its weight methods, joined by +",
    "budget": "the budget of its KV methods: a share, or a size with its unit",
    "task": "the task in short",
    "task_json": "the task's key and parameters",
    "prompt_hash": "a hash of the prompt's token ids",
    "prompt": "the prompt's text, where texts are kept",
    "question": "what was asked, where texts are kept",
    "expected": "the expected answers (JSON), where texts are kept",
    "text": "the reply, where texts are kept",
    "tokens": "the reply's token ids (JSON)",
    "full_text": "the uncompressed model's reply, where texts are kept",
    "kept_hash": "a hash of what the plan keeps: of each layer, KV head and position the tier",
    "settings": "what else decides the figures (JSON): kv_dtype, dtype, chat, longest reply, calibration",
    "notes": "what the run had to say (JSON)",
    "versions": "of workbench, torch, transformers and Python (JSON)",
    "device": "what computed: cpu, or the GPU's name",
    "host": "the machine",
    "note": "what somebody wrote about the row",
    "extra": "what else whoever added the row wants to keep (JSON)",
}
_WHOLE: dict[str, str] = {
    "revision": "0, and one more each time that the row was replaced: retried, noted, pinned, deleted",
    "case_number": "the case of the task: its seed, or the number of a file's entry",
    "prompt_tokens": "tokens that were read",
    "kv_nbytes": "the cache of the prompt on the device",
    "kv_full_nbytes": "the same uncompressed",
    "kv_host_nbytes": "what of the cache lies in host memory",
    "state_nbytes": "states of layers that keep no keys and values",
    "weight_nbytes": "the weights as they lie in memory",
    "weight_deployed_nbytes": "the weights with what is not compressed at 16 bits",
    "total_nbytes": "cache, states and weights on the device",
    "deployed_nbytes": "the same with weights as deployed",
    "peak_nbytes": "the most that was live on the device at once, reading included",
    "first_divergence": "the first token of the reply that differs from the uncompressed reply's; NULL: none",
}
_REAL: dict[str, str] = {
    "kv_share": "kv_nbytes over kv_full_nbytes",
    "score_share": "score entries computed while reading, of all causal ones",
    "kl": "mean KL of the uncompressed model's predictions from the recipe's, nats a token",
    "kl_max": "the worst token's",
    "top1": "share of tokens where both would choose the same next token",
    "nll": "mean negative log-likelihood of the uncompressed answer, or of the given text, nats a token",
    "nll_reference": "the same under the uncompressed model",
    "nll_difference": "how much worse it became",
    "perplexity": "exp(nll)",
    "score": "how right the reply is, 0 to 1",
    "full_score": "how right the uncompressed model's reply is",
    "read_s": "reading the prompt under the recipe's weights and attention, whoever needed it first",
    "plan_s": "deciding what to keep and building the stores",
    "first_token_s": "from the question to the first token",
    "decode_s": "from the first token to the last",
    "tokens_per_s": "decoding speed",
    "wall_s": "all that the row took, without readings that were there already",
}
_FLAGS: dict[str, str] = {
    "correct": "whether the reply is right",
    "full_correct": "whether the uncompressed model's reply is right",
    "pinned": "whether somebody pinned the row",
}
_TIMES: dict[str, str] = {
    "started": "when the work on the row began (UTC)",
    "written": "when the row was stored (UTC)",
}
COLUMNS: Mapping[str, Column] = MappingProxyType(
    {
        **{name: Column("VARCHAR", text) for name, text in _TEXT.items()},
        **{name: Column("BIGINT", text) for name, text in _WHOLE.items()},
        **{name: Column("DOUBLE", text) for name, text in _REAL.items()},
        **{name: Column("BOOLEAN", text) for name, text in _FLAGS.items()},
        **{name: Column("TIMESTAMP", text) for name, text in _TIMES.items()},
    }
)
JSON_COLUMNS = frozenset(
    {"recipe_json", "task_json", "expected", "tokens", "settings", "notes", "versions", "extra"}
)  # text that holds JSON


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of a row about `parts`, which are JSON-able: 32 hexadecimal digits."""
    return hashlib.sha256(canonical(parts).encode()).hexdigest()[:32]


def canonical(value: Any) -> str:
    """JSON in one line, the same for what is equal."""
    return json.dumps(plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def checked(row: Mapping[str, Any]) -> Row:
    """A row with every column, each value of its column's type or None. Raises BadParameter."""
    if unknown := next((name for name in row if name not in COLUMNS), None):
        raise BadParameter(f"results have no column {quoted(unknown)}: what else there is to keep goes into 'extra'")
    if not isinstance(row.get("key"), str) or not row["key"]:
        raise BadParameter("a row needs its key: make one with key_of")
    if row.get("status") not in STATUSES:
        raise BadParameter(f"status is {quoted(row.get('status'))}: give one of {', '.join(STATUSES)}")
    return {name: _value(name, column.kind, row.get(name)) for name, column in COLUMNS.items()}


def _time(value: Any) -> str | None:
    """A time in UTC as text; None for what is none."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    return value.isoformat(sep=" ") if isinstance(value, datetime) and value.tzinfo is None else None


def _value(name: str, kind: Kind, value: Any) -> Any:
    if value is None:
        return None
    if kind == "VARCHAR":
        if not isinstance(value, str) and name in JSON_COLUMNS:
            return canonical(value)
        found: Any = plain(value) if isinstance(value, str) else None
    elif kind == "BOOLEAN":
        found = bool(value) if isinstance(value, bool) or type(value).__name__ == "bool_" else None
    elif kind == "TIMESTAMP":
        found = _time(value)
    elif kind == "BIGINT":
        found = int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
    else:
        found = float(value) if isinstance(value, Real) and not isinstance(value, bool) else None
    if found is None:
        raise BadParameter(f"{name} is {quoted(value)}: the column holds {kind}")
    return found
