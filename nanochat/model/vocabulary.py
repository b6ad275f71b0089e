"""The vocabulary of another's checkpoint: its tokenizer.json as our tokenizer, and the rows of the model to match.

Only byte-level BPE (GPT-2, GPT-NeoX, Llama 3 …) can be taken over: it is what ours is. Merges, splitting and bytes
stay; ids change, for ours are in the order of the merges with the special tokens behind. Tokens that no merge makes
(GPT-NeoX's runs of spaces) are left out, and texts are not normalised.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanochat.errors import NanochatError, UsageError
from nanochat.model.lm import LM
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_letters

# What ByteLevel splits by unless told otherwise (Radford et al. 2019).
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BEGINNINGS = ("<|bos|>", "<|endoftext|>", "<|begin_of_text|>", "<s>")  # what stands before or between documents


def read_tokenizer(path: str | Path) -> tuple[Tokenizer, list[int | None]]:
    """Our tokenizer from a tokenizer.json, and for each of its ids the id there (None: not there).

    Raises UsageError for any other kind than byte-level BPE, NanochatError when the file is missing or damaged.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_bytes())
        model, added = record["model"], record.get("added_tokens") or []
        if model.get("type") != "BPE":
            raise UsageError(f"{path} is a {model.get('type')} tokenizer: only byte-level BPE can be taken over")
        pattern = _pattern(record["pre_tokenizer"], path)
        names = {token["content"]: int(token["id"]) for token in added}
        tokens, rows = _tokens(model, names, path)
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: give the checkpoint's tokenizer.json with --tokenizer") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NanochatError(f"{path} is no tokenizer.json, or it is damaged ({error!r})") from None
    begin = next((names[name] for name in BEGINNINGS if name in names), None)
    special = [begin if name == "<|bos|>" else names.get(name) for name in SPECIAL_TOKENS]
    return Tokenizer(tokens, pattern), [*rows, *special]


def _pattern(pre: dict[str, Any], path: Path) -> str:
    """How the text is split before merging."""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps if step]
    if kinds == ["ByteLevel"] and not steps[0].get("add_prefix_space") and steps[0].get("use_regex", True):
        return GPT2_PATTERN
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        regex = steps[0]["pattern"].get("Regex")
        if regex and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
            return str(regex)
    raise UsageError(f"{path} splits text by {', '.join(kinds) or 'nothing'}: only byte-level BPE can be taken over")


def _tokens(model: dict[str, Any], names: dict[str, int], path: Path) -> tuple[list[bytes], list[int | None]]:
    """Bytes and id there of each token, in the order of the merges."""
    letters = {letter: byte for byte, letter in enumerate(byte_letters())}
    spelled = [letter for letter in letters if letter in model["vocab"]]
    if len(spelled) < 256:
        raise UsageError(f"{path} has tokens for {len(spelled)} of 256 bytes: only byte-level BPE can be taken over")
    for merge in model["merges"]:
        spelled.append("".join(merge.split(" ") if isinstance(merge, str) else merge))
    ordered = [text for text in dict.fromkeys(spelled) if text not in names]
    return [bytes(letters[c] for c in text) for text in ordered], [int(model["vocab"][text]) for text in ordered]


@torch.no_grad()
def reorder(model: LM, rows: Sequence[int | None]) -> LM:
    """The model over another vocabulary: token i is what row `rows[i]` was; a new one (None) is the mean of the others.

    Raises UsageError for a row that there is not.
    """
    have, n = [row for row in rows if row is not None], model.config.vocab_size
    if max(have) >= n:
        raise UsageError(f"the tokenizer has ids up to {max(have)}, the model {n} tokens: they do not belong together")
    other = LM.build(replace(model.config, vocab_size=len(rows)))
    new = [i for i, row in enumerate(rows) if row is None]
    for name, p in other.named_parameters():
        old = model.get_parameter(name)
        if old.shape == p.shape and name not in ("embed.weight", "head.weight"):
            p.copy_(old)
            continue
        p.copy_(old[torch.tensor([row or 0 for row in rows])])
        p[new] = old[torch.tensor(have)].mean(0)
    return other
