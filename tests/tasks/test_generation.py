import math

import pytest
import sacrebleu
import torch

from lte_lightning.tasks.generation import score_texts
from lte_lightning.tasks.language_model import Perplexity


def test_rouge_l_takes_the_best_reference_and_averages_over_examples():
    found = score_texts(["the cat sat", "a b c d"], [["x y", "the cat ran"], ["a b"]])
    # Two of three words of each, both ways; then two of four, and both of two
    assert found["rouge_l"] == pytest.approx((2 / 3 + 2 * 0.5 / 1.5) / 2)


def test_bleu_is_sacrebleu_s_of_the_corpus_in_lower_case_with_as_many_references_as_there_are():
    predictions = ["The cat sat on the mat.", "There is a dog in the garden ."]
    found = score_texts(predictions, [["the cat sat on a mat.", "the CAT sat on the rug."], ["there is a dog here."]])
    streams = [["the cat sat on a mat.", "there is a dog here."], ["the cat sat on the rug.", None]]
    expected = sacrebleu.corpus_bleu(predictions, streams, lowercase=True, tokenize="13a")
    assert found["bleu"] == pytest.approx(expected.score)
    assert 0 < found["bleu"] < 100
    # a missing reference is no empty one, whose length would be the closest to a short prediction
    padded = sacrebleu.corpus_bleu(["a b c d"], [["a b c d e f g h i"], [""]], lowercase=True).score
    assert score_texts(["a b c d"], [["a b c d e f g h i"]])["bleu"] < padded


def test_empty_predictions_score_nothing_and_are_counted():
    found = score_texts(["", "a b c d"], [["a b"], ["a b c d"]])
    assert found["empty_predictions"] == 1
    assert found["rouge_l"] == 0.5
    alone = score_texts([" "], [["a b"]])
    assert (alone["rouge_l"], alone["bleu"], alone["empty_predictions"]) == (0, 0, 1)


def test_perplexity_weighs_tokens_not_batches():
    meter = Perplexity()
    meter.update(torch.tensor(2.0), torch.tensor(1))
    meter.update(torch.tensor(3.0), torch.tensor(9))
    assert meter.compute() == pytest.approx({"loss": 0.5, "perplexity": math.exp(0.5)})


def test_perplexity_per_word_where_words_are_known():
    meter = Perplexity()
    meter.update(torch.tensor(2.0), torch.tensor(4), torch.tensor([1, 0]))
    meter.update(torch.tensor(4.0), torch.tensor(4), torch.tensor([1, 1]))
    assert meter.compute()["word_perplexity"] == pytest.approx(math.exp(2))


def test_a_hopeless_perplexity_is_infinite():
    meter = Perplexity()
    meter.update(torch.tensor(1e4), torch.tensor(1))
    assert meter.compute()["perplexity"] == math.inf
