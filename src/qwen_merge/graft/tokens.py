"""Special tokens that an LLM's tokenizer lacks: into its files, and which rows of the embeddings become theirs.

They take the numbers after the tokenizer's last one. Published embeddings have more rows than tokens (Qwen3: 151,936
and 151,669), and the spare ones serve; where there are none, embedding and head grow to the next multiple of 128.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from qwen_merge.graft.recipe import Tokens
from qwen_merge.merger.companions import Companions, added_token_ids, decode, encode
from qwen_merge.merger.plan import NewRows

MULTIPLE = 128  # of rows, as training on many cards and fast kernels like them
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_VOCABULARY = "vocab.json"
_READ = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", _VOCABULARY)
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def add_missing(companions: Companions, tokens: Tokens, rows: Any) -> tuple[int, dict[str, NewRows]]:
    """Add to the tokenizer's files what it lacks of `tokens`, and say so in a note.

    rows: of the LLM's embeddings (`vocab_size`). Returns how many they have now, and for embedding and head those that
    are drawn; none when nothing is missing, or `rows` is no number, which the plan refuses.
    """
    missing = [spelling for spelling in vars(tokens).values() if spelling not in companions.token_ids]
    if not missing or type(rows) is not int:
        return rows, {}
    files = {name: decode(companions.files[name], name) for name in _READ if name in companions.files}
    base = _base(files)
    first = max((*base.values(), *companions.token_ids.values()), default=-1) + 1
    numbers = itertools.count(first)
    new = {spelling: base[spelling] if spelling in base else next(numbers) for spelling in missing}
    _write(files, new)
    companions.files.update({name: encode(content) for name, content in files.items() if name != _VOCABULARY})
    companions.token_ids = added_token_ids(companions.files)
    last = max(new.values())
    grown = rows if last < rows else -(-(last + 1) // MULTIPLE) * MULTIPLE
    drawn = tuple(sorted({*range(first, last + 1), *range(rows, grown)}))
    told = ", ".join(f"{spelling} is {number}" for spelling, number in new.items())
    place = "rows that were spare" if grown == rows else f"embedding and head grow from {rows:,} to {grown:,} rows"
    companions.notes.append(f"added to the tokenizer: {told}; {place}, drawn about the mean of the others")
    return grown, {name: NewRows(drawn, min(first, rows), rows) for name in (EMBEDDING, HEAD)} if drawn else {}


def _base(files: Mapping[str, dict]) -> dict[str, int]:
    """The tokenizer's numbers without its added tokens."""
    if "tokenizer.json" in files:
        vocabulary = (files["tokenizer.json"].get("model") or {}).get("vocab") or {}
        return vocabulary if isinstance(vocabulary, dict) else {piece[0]: n for n, piece in enumerate(vocabulary)}
    return files.get(_VOCABULARY, {})


def _write(files: dict[str, dict], new: dict[str, int]) -> None:
    for spelling, number in new.items():
        entry = {"content": spelling, **_FLAGS}
        if "tokenizer.json" in files:
            files["tokenizer.json"].setdefault("added_tokens", []).append({"id": number, **entry})
        if "added_tokens.json" in files:
            files["added_tokens.json"][spelling] = number
        files["tokenizer_config.json"].setdefault("added_tokens_decoder", {})[str(number)] = entry
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            files[name]["additional_special_tokens"] = [*(files[name].get("additional_special_tokens") or ()), *new]
