"""Write a tokenizer to a GGUF file in llama.cpp's terms."""

import json
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from lte_lightning.errors import UserError

# llama.cpp's names of the ways in which byte-level BPE cuts a text before it merges. The key is the steps in
# tokenizer.json, and whether a word that is a token stays whole.
_CUTS = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        ),
        True,
    ): "llama-bpe",
    (
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
            r"|\s+(?!\S)|\s+",
        ),
        False,
    ): "qwen2",
}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's character for a space


def write_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Adds a tokenizer's vocabulary, special tokens and chat template to a GGUF file.

    Args:
        writer: The writer of the package ``gguf``.
        tokenizer: A fast tokenizer.
        vocab_size: Rows of the model's embedding. Rows past the tokenizer's tokens are marked as unused.

    Raises:
        UserError: If llama.cpp has no equal tokenizer.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    name, model = tokenizer.name_or_path, content["model"]
    if model["type"] != "BPE":
        raise UserError(f"the tokenizer {name} is a {model['type']} model; only BPE is supported in GGUF files")
    tokens = {identity: (token, "NORMAL") for token, identity in model["vocab"].items()}
    for added in content["added_tokens"]:
        tokens[added["id"]] = (added["content"], "CONTROL" if added["special"] else "USER_DEFINED")
    if max(tokens) >= vocab_size:
        raise UserError(
            f"the tokenizer {name} has a token {max(tokens)}, and the model's vocabulary ends at {vocab_size - 1}; "
            "save the model's own tokenizer beside it"
        )
    if model.get("byte_fallback"):
        _write_sentencepiece(writer, tokenizer, model, tokens, vocab_size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_cut(name, content))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    listed = [tokens.get(identity, (f"[PAD{identity}]", "UNUSED")) for identity in range(vocab_size)]
    writer.add_token_list([token for token, _ in listed])
    writer.add_token_types([_TYPES[kind] for _, kind in listed])
    _write_special(writer, tokenizer)


_TYPES = {"NORMAL": 1, "UNKNOWN": 2, "CONTROL": 3, "USER_DEFINED": 4, "UNUSED": 5, "BYTE": 6}


def _cut(name: str, content: dict[str, Any]) -> str:
    normalizer = (content["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UserError(f"the tokenizer {name} normalises texts by {normalizer}, which llama.cpp's BPE does not do")
    steps = tuple(_steps(content["pre_tokenizer"] or {}))
    if (cut := _CUTS.get((steps, bool(content["model"].get("ignore_merges"))))) is None:
        raise UserError(
            f"the tokenizer {name} splits texts by {' then '.join(steps)}, for which llama.cpp has no equivalent; "
            f"supported are the splits of {', '.join(_CUTS.values())}"
        )
    return cut


def _steps(step: dict[str, Any]) -> Iterator[str]:
    kind = step.get("type")
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        yield step["pattern"].get("Regex") or repr(step["pattern"])
    elif kind == "Digits" and step["individual_digits"]:
        yield kind
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step["use_regex"]:
            yield kind
    else:
        yield json.dumps(step)


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _write_sentencepiece(
    writer: Any,
    tokenizer: PreTrainedTokenizerBase,
    model: dict[str, Any],
    tokens: dict[int, tuple[str, str]],
    vocab_size: int,
) -> None:
    """Turns the ranks of merges into scores. SentencePiece merges the pair with the best score first."""
    vocabulary = model["vocab"]
    rank: dict[int, int] = {}
    for i, merge in enumerate(model["merges"]):
        rank.setdefault(vocabulary["".join(_pair(merge))], i)
    last = float(len(model["merges"]))
    scores = [-float(rank.get(identity, last)) for identity in range(vocab_size)]
    for identity, (token, kind) in tokens.items():
        if token == model.get("unk_token"):
            tokens[identity] = (token, "UNKNOWN")
        elif kind == "NORMAL" and len(token) == 6 and token.startswith("<0x"):
            tokens[identity] = (token, "BYTE")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(scores)
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    writer.add_add_space_prefix(first.startswith(_SPACE))


def _write_special(writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    for kind in ("bos", "eos", "unk", "pad"):
        if (identity := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(identity)
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    writer.add_add_bos_token(ids != bare and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids != bare and ids[-1] == tokenizer.eos_token_id)
    if isinstance(template := tokenizer.chat_template, str):
        writer.add_chat_template(template)
