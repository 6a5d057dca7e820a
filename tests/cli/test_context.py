"""`lte context`: rows whose answers stand in the context, and how often a model finds them."""

import csv
import re
import shutil

import huggingface_hub.utils as hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lte_lightning
from lte_lightning.bench.context import TASKS, Words, make_rows, measure
from lte_lightning.cli import main
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.folder import read_description
from lte_lightning.core.model.thresholds import Setting, ThresholdTable, write_table
from lte_lightning.errors import UserError


@pytest.fixture(scope="module")
def folders(tiny_lm, make_lm_tokenizer, tmp_path_factory):
    """`plain`, and `sparse`: the same model in hard mode, with a knob from 30 to 70 %."""
    root = tmp_path_factory.mktemp("context")
    shutil.copytree(tiny_lm.model, root / "plain")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(root / "plain")
    lte_lightning.convert(model, lte_lightning.LteConfig(expert_size=8, router_margin=0.1, router_scale=2.0))
    lte_lightning.set_mode(model, "hard")
    lte_lightning.save_pretrained(model, root / "sparse")
    make_lm_tokenizer().save_pretrained(root / "sparse")
    settings = tuple(Setting(s, s, (s, s), (s, s)) for s in (0.3, 0.7))
    write_table(ThresholdTable(settings, "free", 99), root / "sparse", read_description(root / "sparse"))
    return root


@pytest.fixture
def words(folders):
    return Words(AutoTokenizer.from_pretrained(folders / "plain"))


@pytest.mark.parametrize("tokens", [32, 33, 100, 400])
@pytest.mark.parametrize("task", TASKS)
def test_answers_stand_in_the_context(task, tokens, words):
    rows = make_rows(task, words, 5, tokens)
    assert tokens - 3 < rows.ids_BT.shape[1] <= tokens
    assert make_rows(task, words, 5, tokens).ids_BT.equal(rows.ids_BT)
    assert not make_rows(task, words, 5, tokens, seed=1).ids_BT.equal(rows.ids_BT)
    for row, ids in enumerate(rows.ids_BT.tolist()):
        for place in rows.places_A.tolist():
            before = ids[: place - 1]
            if task == "count":
                four = rows.candidates_BC[row].tolist()
                counts = [before.count(word) for word in four]
                assert max(counts) == counts[four.index(ids[place])] > sorted(counts)[-2]
            elif task == "copy":
                half = (len(ids) - len(words.start) - len(words.line)) // 2
                assert ids[place] == ids[place - half - len(words.line)]
            else:
                assert ids[before.index(ids[place - 1]) + 1] == ids[place]


def test_more_keys_than_words(words):
    with pytest.raises(UserError, match=r"rows of 700 tokens need 450 different words for 225 keys and v"):
        make_rows("retrieve", words, 5, 700)


class Oracle(torch.nn.Module):
    """A model that puts the token first which followed the last one's first appearance."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    base_model = property(lambda self: self)
    device = torch.device("cpu")

    def get_output_embeddings(self):
        return lambda hidden_BTD: hidden_BTD

    def forward(self, input_ids, use_cache):
        found = torch.zeros(*input_ids.shape, self.size)
        for row, ids in enumerate(input_ids.tolist()):
            for place, token in enumerate(ids):
                found[row, place, ids[ids.index(token) + 1] if ids.index(token) < place else 0] = 1.0
        return type("Output", (), {"last_hidden_state": found})


@pytest.mark.parametrize("task", ["copy", "retrieve"])
def test_who_looks_back_finds_everything(task, words):
    rows = make_rows(task, words, 6, 128)
    assert measure(Oracle(400), rows, batch=4, traced=False) == (1.0, 0.0, 0.0)
    wrong = torch.where(rows.ids_BT == rows.ids_BT[0, rows.places_A[-1]], 5, rows.ids_BT)  # one answer of the first row
    accuracy, error, _ = measure(Oracle(400), type(rows)(wrong, rows.places_A), batch=4, traced=False)
    assert accuracy >= 5 / 6
    assert error >= 0


def test_a_sparse_model_beside_its_dense_function(folders, lightning, tmp_path):
    files = ("--csv", "scores.csv", "--picture", "scores.svg")
    options = ("--tokens", "40,80", "--rows", 6, "--batch-size", 4, "--tasks", "count,copy")
    outcome = lightning(tmp_path, None, "context", folders / "sparse", "--sparsity", "0.3,0.7", *options, *files)
    assert outcome.code == 0, outcome.err
    with (tmp_path / "scores.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [(row["setting"], row["task"], row["tokens"]) for row in found[:5]] == [
        ("dense", "count", "40"),
        ("dense", "count", "80"),
        ("dense", "copy", "40"),
        ("dense", "copy", "80"),
        ("30 %", "count", "40"),
    ]
    assert {row["setting"] for row in found} == {"dense", "30 %", "70 %"}
    model = lte_lightning.from_pretrained(folders / "sparse")
    words = Words(AutoTokenizer.from_pretrained(folders / "sparse"))
    for row in found:
        rows = make_rows(row["task"], words, 6, int(row["tokens"]))
        dense = row["setting"] == "dense"
        lte_lightning.set_mode(model, "dense" if dense else "hard")
        for ffn in expert_ffns(model).values():
            ffn.threshold = 0.0 if dense else float(row["setting"].removesuffix(" %")) / 100
        with torch.no_grad(), lte_lightning.RouterTrace(model) as trace:
            logits_BTV = model(input_ids=rows.ids_BT).logits
        logits_BAV = logits_BTV[:, rows.places_A - 1]
        if rows.candidates_BC is not None:
            others = torch.ones_like(logits_BAV, dtype=torch.bool)
            others.scatter_(-1, rows.candidates_BC[:, None].expand(-1, 1, -1), False)
            logits_BAV = logits_BAV.masked_fill(others, -torch.inf)
        hits_B = (logits_BAV.argmax(-1) == rows.ids_BT[:, rows.places_A]).double().mean(1)
        assert float(row["accuracy"]) == pytest.approx(hits_B.mean().item(), rel=1e-3)
        assert float(row["error"]) == pytest.approx(hits_B.std().item() / 6**0.5, rel=1e-3)
        assert float(row["sparsity"]) == pytest.approx(0.0 if dense else trace.counts().sparsity(), rel=1e-3)
    assert "count (chance 25%)" in outcome.out
    assert "<svg" in (tmp_path / "scores.svg").read_text()


def test_a_plain_model_and_one_without_a_sparsity(folders, lightning, tmp_path):
    options = ("--tokens", "40", "--rows", 1, "--tasks", "copy")
    plain = lightning(tmp_path, None, "context", folders / "plain", *options)
    assert plain.code == 0, plain.err
    assert "sparse" not in plain.out
    assert "(nan)" in plain.out  # of one row there is no error
    own = lightning(tmp_path, None, "context", folders / "sparse", *options)
    assert "sparse: FFN sparsity" in own.out


def test_a_bar_on_a_terminal(folders, terminal):
    """Loading a model hides the libraries' bars, and no longer than that."""
    with terminal.attached():
        main(["context", str(folders / "plain"), "--tokens", "40", "--rows", "1", "--tasks", "copy"])
    assert re.search(r"\rmeasuring: +0%\|", terminal.getvalue())
    assert "Loading" not in terminal.getvalue()
    assert not hub.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tokens", "16"), "--tokens is 16; give lengths of at least 32"),
        (("--tokens", "64,x"), "--tokens is 64,x"),
        (("--tokens", "512"), "--tokens has 512, and .* takes 256"),
        (("--tasks", "copy,sing"), "--tasks has 'sing'; there are copy, retrieve, count"),
        (("--rows", "0"), "--rows is 0"),
        (("--sparsity", "0.9", "--tokens", "64"), "calibrated for 0.3 to 0.7"),
        (("--sparsity", "2"), "--sparsity is 2"),
        (("--picture", "x.gif"), "--picture is x.gif"),
        (("--csv", "nowhere/x.csv"), "there is no folder nowhere"),
    ],
)
def test_wrong_options(options, message, folders, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "context", folders / "sparse", *options)
    assert outcome.code == 1
    assert re.search(message, " ".join(outcome.err.split())), outcome.err


def test_a_plain_model_has_no_knob(folders, lightning, tmp_path):
    outcome = lightning(tmp_path, None, "context", folders / "plain", "--sparsity", "0.5")
    assert "is a plain model; leave it out" in " ".join(outcome.err.split())
