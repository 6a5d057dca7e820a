"""Long contexts: synthetic rows whose answers stand far back, and how often a language model finds them.

The three tasks use single-token words in random order, so that only the context helps:

- ``copy``: random words, then the same words again; the model predicts each word of the second copy (Olsson et al.:
  "In-context Learning and Induction Heads", 2022, arXiv 2209.11895).
- ``retrieve``: lines of a key and a value; the last lines repeat some keys, and the model predicts their values
  (Mohtashami, Jaggi: "Landmark Attention: Random-Access Infinite Context Length for Transformers", 2023, arXiv
  2305.16300, use a single passkey).
- ``count``: four words, one of them twice as frequent as each of the others; the model chooses the most frequent of the
  four (after the common-words task of Hsieh et al.: "RULER: What's the Real Context Size of Your Long-Context Language
  Models?", 2024, arXiv 2404.06654).

Shapes: B rows, T tokens, A answers of a row, C candidates, V words of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lte_lightning.bars import Bar
from lte_lightning.core.model.experts import set_mode
from lte_lightning.core.model.thresholds import require_settings, set_sparsity
from lte_lightning.core.routing.trace import RouterTrace
from lte_lightning.errors import UserError

SHORTEST = 32
_PREFIX = 4  # first words of the second copy, which are not scored: they tell the model what to copy
_QUERIES = 8  # the most keys that a row asks for
_CANDIDATES = 4


@dataclass(frozen=True)
class Rows:
    """Rows of one task and length.

    Args:
        ids_BT: Tokens.
        places_A: Positions of the answers; each is predicted at the token before it.
        candidates_BC: Tokens that an answer is chosen from; None for the whole vocabulary.
    """

    ids_BT: torch.Tensor
    places_A: torch.Tensor
    candidates_BC: torch.Tensor | None = None


@dataclass(frozen=True)
class Score:
    """A model's accuracy on one task and length.

    Args:
        setting: ``dense``, ``sparse`` as the model was saved, or the sparsity that its knob was set to.
        task: A name in `TASKS`.
        tokens: Requested length of the rows.
        rows: Number of rows.
        accuracy: Share of the answers that the model ranks first, averaged over rows.
        error: Standard error of the accuracy; NaN for a single row.
        sparsity: FFN sparsity over all tokens of these rows; 0 in dense mode.
    """

    setting: str
    task: str
    tokens: int
    rows: int
    accuracy: float
    error: float
    sparsity: float


class Words:
    """Single tokens to build rows from: whole words if the vocabulary has enough, else all tokens that are not special.

    Args:
        tokenizer: The model's.

    Raises:
        UserError: If the tokenizer has fewer than 16 such tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = {i: str(tokenizer.decode([i])) for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids}
        words = [i for i, text in texts.items() if text[:1] == " " and text[1:].isalpha() and len(text) > 3]
        self.ids_V = torch.tensor(words if len(words) >= 256 else list(texts))
        self.start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self.line = _ids(tokenizer, "\n") or [int(self.ids_V[0])]
        self.ids_V = self.ids_V[~torch.isin(self.ids_V, torch.tensor(self.line))]
        if len(self.ids_V) < 16:
            raise UserError(
                f"the tokenizer has only {len(self.ids_V)} tokens that are not special; at least 16 are needed"
            )
        self.question = _ids(tokenizer, "\nThe most common of these words is") or self.line

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Returns random words [count]; none repeats before all have been used."""
        rounds = -(-count // len(self.ids_V))
        orders = [torch.randperm(len(self.ids_V), generator=generator) for _ in range(rounds)]
        return self.ids_V[torch.cat(orders)[:count]]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [i for i in tokenizer(text, add_special_tokens=False)["input_ids"] if i != tokenizer.unk_token_id]


def _copies(words: Words, rows: int, tokens: int, generator: torch.Generator) -> Rows:
    length = (tokens - len(words.start) - len(words.line)) // 2
    texts = [words.draw(length, generator).tolist() for _ in range(rows)]
    ids_BT = torch.tensor([[*words.start, *text, *words.line, *text] for text in texts])
    return Rows(ids_BT, torch.arange(ids_BT.shape[1] - length + _PREFIX, ids_BT.shape[1]))


def _pairs(words: Words, rows: int, tokens: int, generator: torch.Generator) -> Rows:
    each = 2 + len(words.line)
    lines = (tokens - len(words.start)) // each
    asked = max(1, min(_QUERIES, lines // 4))
    kept = lines - asked
    if 2 * kept > len(words.ids_V):  # some words would repeat, and a key would have two values
        raise UserError(
            f"rows of {tokens} tokens need {2 * kept} different words for {kept} keys and values, and the tokenizer "
            f"has {len(words.ids_V)}; shorten the rows"
        )
    ids = []
    for _ in range(rows):
        keys_and_values = words.draw(2 * kept, generator).view(2, kept).T
        again = keys_and_values[torch.randperm(kept, generator=generator)[:asked]]
        text = [token for pair in [*keys_and_values.tolist(), *again.tolist()] for token in [*pair, *words.line]]
        ids.append([*words.start, *text])
    places = len(ids[0]) - each * torch.arange(asked, 0, -1) + 1
    return Rows(torch.tensor(ids), places)


def _counts(words: Words, rows: int, tokens: int, generator: torch.Generator) -> Rows:
    length = tokens - len(words.start) - len(words.question) - 1
    share = length // (_CANDIDATES + 1)
    ids, candidates = [], []
    for _ in range(rows):
        four = words.draw(_CANDIDATES, generator)
        text = torch.cat([four[:1].repeat(length - (_CANDIDATES - 1) * share), four[1:].repeat(share)])
        text = text[torch.randperm(length, generator=generator)]
        ids.append([*words.start, *text.tolist(), *words.question, int(four[0])])
        candidates.append(four)
    return Rows(torch.tensor(ids), torch.tensor([len(ids[0]) - 1]), torch.stack(candidates))


TASKS: dict[str, Callable[[Words, int, int, torch.Generator], Rows]] = {
    "copy": _copies,
    "retrieve": _pairs,
    "count": _counts,
}
CHANCE = {"count": 1 / _CANDIDATES}


def make_rows(task: str, words: Words, rows: int, tokens: int, seed: int = 0) -> Rows:
    """Returns rows of a task; the same arguments give the same rows.

    Args:
        task: A name in `TASKS`.
        words: The words to build them from.
        rows: B.
        tokens: The largest T, at least `SHORTEST`; a row may be a little shorter.
        seed: Seed of the rows.

    Raises:
        UserError: If the vocabulary has too few words for rows of this length.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + tokens * 11 + list(TASKS).index(task))
    return TASKS[task](words, rows, tokens, generator)


def compare(
    model: PreTrainedModel,
    words: Words,
    tasks: Sequence[str],
    lengths: Sequence[int],
    sparsities: Sequence[float] | None,
    rows: int,
    batch: int,
    seed: int,
    skips: bool,
) -> list[Score]:
    """Measures a language model densely and at each sparsity, on the same rows.

    Args:
        model: Plain, or with expert FFNs, in evaluation mode. A model that selects experts is in hard mode afterwards.
        words: The words to build rows from.
        tasks: Names in `TASKS`.
        lengths: Tokens of the rows.
        sparsities: Settings of its sparsity knob; None leaves the knob as it is.
        rows: Rows of each task and length.
        batch: Rows per forward pass.
        seed: Seed of the rows.
        skips: Whether the model selects experts.

    Raises:
        UserError: If the model has no knob, or the knob does not reach a sparsity. Nothing has been measured then.
    """
    settings: list[tuple[str, float | None]] = [("dense", None)]
    if skips:
        settings += [("sparse", None)] if sparsities is None else [(f"{100 * s:g} %", s) for s in sparsities]
        require_settings(model, sparsities or ())
    scores = []
    for setting, sparsity in Bar(settings, desc="measuring"):
        if skips:
            set_mode(model, "dense" if setting == "dense" else "hard")
        if sparsity is not None:
            set_sparsity(model, sparsity)
        for task in tasks:
            for length in lengths:
                made = make_rows(task, words, rows, length, seed)
                accuracy, error, used = measure(model, made, batch, traced=setting != "dense")
                scores.append(Score(setting, task, length, rows, accuracy, error, used))
    return scores


@torch.no_grad()
def measure(model: PreTrainedModel, rows: Rows, batch: int, traced: bool) -> tuple[float, float, float]:
    """Returns a language model's accuracy, its standard error, and the FFN sparsity.

    Args:
        model: In the mode to measure.
        rows: The rows.
        batch: Rows per forward pass.
        traced: Whether experts are selected, so that there is a sparsity.
    """
    hits, counts = [], []
    places_A = rows.places_A.to(model.device)
    for begin in range(0, len(rows.ids_BT), batch):
        ids_BT = rows.ids_BT[begin : begin + batch].to(model.device)
        if traced:
            with RouterTrace(model, torch.ones_like(ids_BT)) as trace:
                hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            counts.append(trace.counts())
        else:
            hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        head: Any = model.get_output_embeddings()
        logits_BAV = head(hidden_BTD[:, places_A - 1])  # at answers alone: logits of all tokens would be gigabytes
        if rows.candidates_BC is None:
            answers_BA = logits_BAV.argmax(dim=-1)
        else:
            candidates_BC = rows.candidates_BC[begin : begin + batch].to(model.device)
            logits_BAC = logits_BAV.gather(-1, candidates_BC[:, None].expand(-1, len(places_A), -1))
            answers_BA = candidates_BC.gather(1, logits_BAC.argmax(dim=-1))
        hits.append((answers_BA == ids_BT[:, places_A]).double().mean(dim=1))
    hits_B = torch.cat(hits)
    error = hits_B.std().item() / math.sqrt(len(hits_B)) if len(hits_B) > 1 else math.nan
    return hits_B.mean().item(), error, reduce(add, counts).sparsity() if counts else 0.0
