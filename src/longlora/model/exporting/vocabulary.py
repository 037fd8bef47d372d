"""A fast tokenizer as llama.cpp's tokenizer keys: byte-level BPE, or SentencePiece's BPE with byte fallback.

llama.cpp has the rules by which a text is split before merging in its own code, by name (src/llama-vocab.cpp). The
name is found from the rules themselves, not from a list of known models, so that a tokenizer of one's own works too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from longlora.corpus.encoding import beginning
from longlora.errors import UserError
from longlora.model.stopping import ends_of_turn

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITS = {
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST: "qwen2",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""The regular expression by which a byte-level tokenizer splits -> llama.cpp's name for it."""

_UNREACHED = -1e6
"""Score of a token that no merge makes."""

_BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to tokenise as the tokenizer does."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (SentencePiece)."""
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str]
    """Byte-level only: two pieces with a blank between them."""
    scores: list[float]
    """SentencePiece only."""
    add_space_prefix: bool
    add_bos: bool

    def write(self, writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
        """Add everything that belongs to the tokenizer, the chat template among it."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        ends = ends_of_turn(tokenizer) - {tokenizer.eos_token_id}
        for add, token in (
            (writer.add_eot_token_id, min(ends, default=None)),
            (writer.add_bos_token_id, tokenizer.bos_token_id),
            (writer.add_eos_token_id, tokenizer.eos_token_id),
            (writer.add_unk_token_id, tokenizer.unk_token_id),
            (writer.add_pad_token_id, tokenizer.pad_token_id),
        ):
            if token is not None:
                add(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            writer.add_chat_template([{"name": name, "template": text} for name, text in template.items()])
        elif template:
            writer.add_chat_template(template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int) -> Vocabulary:
    """The vocabulary of `tokenizer` for an embedding of `rows` rows.

    Raises:
        UserError: it is of a kind that llama.cpp does not have, or that is not known here.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("the tokenizer has no tokenizer.json, from which its rules are read: save it as a fast one.")
    rules = json.loads(backend.to_str())
    model = rules["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} model")
    if len(tokenizer) > rows:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens but the model embeds only {rows:,}: give the tokenizer that "
            "belongs to it, or resize its embedding and train the new rows."
        )
    tokens, types = _entries(tokenizer, model["vocab"], rows)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ", 1)) for merge in model["merges"]]
    if model.get("byte_fallback"):
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = TokenType.UNKNOWN
        return Vocabulary(
            model="llama",
            pre="default",
            tokens=tokens,
            types=types,
            merges=[],
            scores=_scores(tokens, model["vocab"], merges),
            add_space_prefix=_prefixes_space(rules),
            add_bos=bool(beginning(tokenizer)),
        )
    return Vocabulary(
        model="gpt2",
        pre=_split_name(rules),
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in merges],
        scores=[],
        add_space_prefix=False,
        add_bos=bool(beginning(tokenizer)),
    )


def _entries(
    tokenizer: PreTrainedTokenizerBase, vocabulary: Mapping[str, int], rows: int
) -> tuple[list[str], list[TokenType]]:
    """Token and type of each row of the embedding."""
    added = tokenizer.added_tokens_decoder
    by_id = {number: token for token, number in vocabulary.items()}
    tokens, types = [], []
    for number in range(rows):
        if number in added:
            tokens.append(added[number].content)
            types.append(TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED)
        elif number in by_id:
            token = by_id[number]
            tokens.append(token)
            types.append(TokenType.BYTE if token in _BYTES else TokenType.NORMAL)
        else:
            tokens.append(f"[PAD{number}]")
            types.append(TokenType.UNUSED)
    return tokens, types


def _split_name(rules: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level tokenizer splits a text before it merges."""
    normalizer = rules["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp leaves to who gives the text
        raise _unknown(f"a {normalizer['type']} normaliser")
    before = rules["pre_tokenizer"] or {"type": "none"}
    parts = before["pretokenizers"] if before["type"] == "Sequence" else [before]
    last = parts[-1]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _unknown("pre-tokenisation by " + ", ".join(part["type"] for part in parts))
    if last["use_regex"] and len(parts) == 1:
        return "gpt-2"
    if last["use_regex"] and len(parts) == 2 and parts[0] == {"type": "Digits", "individual_digits": True}:
        return "smollm"
    if not last["use_regex"] and len(parts) == 2 and parts[0]["type"] == "Split":
        expression = parts[0]["pattern"].get("Regex")
        if expression in SPLITS and parts[0]["behavior"] == "Isolated" and not parts[0]["invert"]:
            return SPLITS[expression]
        raise _unknown(f"the split {expression}")
    raise _unknown("pre-tokenisation by " + ", ".join(part["type"] for part in parts))


def _prefixes_space(rules: Mapping[str, Any]) -> bool:
    """Whether a blank goes before a text, as SentencePiece's `add_dummy_prefix` says."""
    normalizer, before = rules["normalizer"] or {"type": "none"}, rules["pre_tokenizer"] or {"type": "none"}
    if before["type"] == "Metaspace":
        return before["prepend_scheme"] != "never"
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    kinds = [step["type"] for step in steps]
    if before["type"] != "none" or "Replace" not in kinds or not set(kinds) <= {"Prepend", "Replace"}:
        raise _unknown(f"normalisation by {', '.join(kinds)} and pre-tokenisation by {before['type']}")
    return "Prepend" in kinds


def _scores(tokens: list[str], vocabulary: Mapping[str, int], merges: list[tuple[str, ...]]) -> list[float]:
    """A score a token, such that llama.cpp, which merges the best-scored pair first, merges in the order of `merges`.

    Raises:
        UserError: pairs are in the vocabulary that do not merge, which llama.cpp would merge all the same.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    known = set(merges)
    for token in ranks:
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise _unknown(f"merges that leave out a pair of its vocabulary, {pair[0]} {pair[1]}")
    return [-float(ranks[token]) if token in ranks else 0.0 if len(token) == 1 else _UNREACHED for token in tokens]


def _unknown(what: str) -> UserError:
    return UserError(
        f"the tokenizer has {what}, which llama.cpp does not know or longlora cannot name to it: merge the model "
        "(`longlora merge`) and try llama.cpp's own convert_hf_to_gguf.py on the folder."
    )
