"""The tutorials, run from their notebooks on tiny models and files: commands and cells of Python, in their order."""

import importlib.util
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

import mlflow
import pandas
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    pipeline,
)

import lte_lightning

from .conftest import ANIMALS, BAD, FILLERS, GOOD

DOCS = Path(__file__).parents[2] / "docs"
STARS = {"awful": BAD[0], "bad": BAD[1], "fine": GOOD[2], "good": GOOD[0], "great": GOOD[1]}
TEXTS = ["the film was good", "a dull plot", "very bright is the end"]
# What a tiny model needs, and what makes a fit short; behind the commands as they are printed
SMALL = {
    "--model.lte.expert_size": 8,
    "--trainer.accelerator": "cpu",
    "--trainer.precision": "32-true",
    "--data.max_length": 16,
    "--data.batch_size": 8,
    "--trainer.enable_progress_bar": "false",
    **{f"--stages.{stage}.learning_rate": 5e-3 for stage in ("dense", "router", "expert")},
    **{f"--stages.{stage}.epochs": 1 for stage in ("dense", "router", "expert")},
}
CHAT = {"--data.max_length": 200, "--model.samples": 0}


def notebook(name):
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.notebook((DOCS / "tutorials" / f"{name}.md").read_text())


def added(name, words, more, model):
    """What a tiny model needs of a command: options that the page itself has stay as they are."""
    if name == "init":
        return [] if "--model" in words else ["--model", str(model)]
    if name == "sweep":  # a sweep's variants have epochs of their own
        more = {key: value for key, value in more.items() if not key.endswith("epochs")}
        words[words.index("--seeds") + 1] = "0"
    fits = name in ("fit", "sweep")
    return [str(word) for pair in more.items() if fits and pair[0] not in words for word in pair]


@pytest.fixture
def follow(lightning, tmp_path, monkeypatch):
    """`follow(name, more)` runs a notebook; ``more`` are options of fits. Returns what the commands print, by line."""

    def run(name, more, model=None, alone=False):
        monkeypatch.chdir(tmp_path)
        printed, known = {}, {}
        for cell in notebook(name)["cells"]:
            if cell["cell_type"] != "code":
                continue
            code = cell["source"]
            if not code.startswith("%%bash\n"):
                exec(code, known)
                continue
            variables = {}
            for line in code.removeprefix("%%bash\n").splitlines():
                if line.startswith("RUN="):
                    shell = f"{line}\nprintf %s $RUN"
                    variables["RUN"] = subprocess.check_output(["bash", "-c", shell], text=True)
                    continue
                command = line.replace("$RUN", variables.get("RUN", ""))
                _, name, *words = shlex.split(command)
                words += added(name, words, more, model)
                if alone and name == "fit":
                    subprocess.run([sys.executable, "-m", "lte_lightning", name, *words], check=True)
                    continue
                outcome = lightning(tmp_path, None, name, *words)
                assert outcome.code == 0, outcome.err
                printed[line] = outcome.out + outcome.err
        return printed

    return run


@pytest.fixture
def reviews(tmp_path):
    """`reviews.csv` and `new.csv`, as the pages have them."""
    draw = random.Random(0)
    rows = [
        f'"{" ".join([*draw.choices(FILLERS, k=4), STARS[star]])}",{star}\n' for star in draw.choices(list(STARS), k=80)
    ]
    (tmp_path / "reviews.csv").write_text("review,stars\n" + "".join(rows))
    (tmp_path / "new.csv").write_text("review\n" + "".join(row.rpartition(",")[0] + "\n" for row in rows[:9]))


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("reviews")
def test_a_classifier_from_a_csv_file(follow, tiny, tmp_path, capsys):
    half = {
        "--model.efficiency_weight": "null",
        "--model.lte.target_sparsity": 0.5,
    }
    follow("own-classifier", SMALL | half | {"--model.pretrained": tiny.model})
    assert len(next(tmp_path.glob("runs/*/*/predictions*.jsonl")).read_text().splitlines()) == 9
    said = capsys.readouterr().out
    assert any(star in said for star in STARS)
    assert "probability" in said  # MLflow's answer
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    losses = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert len(losses) == 3  # of every epoch, although all have fewer batches than Lightning's interval
    with torch.no_grad():
        every_tool_answers_alike(tmp_path)


def every_tool_answers_alike(folder):
    """What `lte push --cache hub` wrote, in each tool, beside the run's own model."""
    hub = {"cache_dir": folder / "hub"}
    (run,) = (results.parent for results in folder.glob("runs/*/*/results.json"))
    tokenizer = AutoTokenizer.from_pretrained("me/reviews", **hub)
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    sparse = lte_lightning.from_pretrained("me/reviews", **hub).eval()
    logits = sparse(**batch).logits
    assert torch.equal(logits, lte_lightning.from_pretrained(run / "model").eval()(**batch).logits)
    assert set(sparse.config.id2label.values()) == set(STARS)
    shares, classes = logits.softmax(dim=1).max(dim=1)
    labels = [sparse.config.id2label[number] for number in classes.tolist()]

    said = pipeline("text-classification", model=sparse, tokenizer=tokenizer)(TEXTS)
    assert [one["label"] for one in said] == labels
    assert [one["score"] for one in said] == pytest.approx(shares.tolist(), abs=1e-5)
    served = mlflow.pyfunc.load_model("models:/reviews/1").predict(pandas.DataFrame({"review": TEXTS}))
    assert served["label"].tolist() == labels
    assert served["probability"].tolist() == pytest.approx(shares.tolist(), abs=1e-5)

    dense = AutoModelForSequenceClassification.from_pretrained("me/reviews", **hub).eval()
    lte_lightning.set_mode(sparse, "dense")
    torch.testing.assert_close(dense(**batch).logits, sparse(**batch).logits)
    assert not torch.allclose(dense(**batch).logits, logits, atol=1e-6)

    card = ModelCard.load(next((folder / "hub").glob("models--me--reviews/snapshots/*/README.md")))
    assert 'lte_lightning.from_pretrained("me/reviews")' in card.text
    for line in ("router_training | straight-through", "router_start | closed-form", "distillation | 0.5"):
        assert f"| {line} |" in card.text  # the recipe's own options
    (measured,) = card.data.eval_results
    results = json.loads((run / "results.json").read_text())
    assert (measured.dataset_name, measured.metric_type) == ("reviews", "accuracy")
    assert measured.metric_value == pytest.approx(results["hard"], abs=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("form", range(4))
def test_a_chat_model_of_each_form(form, follow, tiny_lm, make_lm_tokenizer, tmp_path):
    lines = (DOCS / "tutorials" / "chat.md").read_text().split("```json\n")[1].split("```")[0].splitlines()
    text = lines[form]
    rows = [text.replace("Blue.", animal).replace("Name a colour.", f"say {animal}") for animal in ANIMALS] * 3
    assert all(json.loads(row) for row in rows)
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    model = tmp_path / "tiny-chat"
    AutoModelForCausalLM.from_pretrained(tiny_lm.model).save_pretrained(model)
    make_lm_tokenizer(chat=True).save_pretrained(model)
    printed = follow("chat", SMALL | CHAT | {"--model.pretrained": model})
    assert sum("FFN sparsity" in out for out in printed.values()) == 2


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("reviews")
def test_from_somebody_elses_model(follow, tiny, tmp_path):
    names = dict(enumerate(["GREAT", "bad", "fine", "good", "awful"]))
    model = BertForSequenceClassification.from_pretrained(
        tiny.model, num_labels=5, id2label=names, label2id={name: i for i, name in names.items()}
    )
    model.save_pretrained(tmp_path / "their-model")
    AutoTokenizer.from_pretrained(tiny.model).save_pretrained(tmp_path / "their-model")
    follow("checkpoint", SMALL)
    config = json.loads(next(tmp_path.glob("runs/*/*/model/config.json")).read_text())
    assert list(config["id2label"].values()) == [
        "great",
        "bad",
        "fine",
        "good",
        "awful",
    ]  # the model's order, the data's spelling


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("reviews")
def test_methods_are_compared(fits_here, follow, tiny, tmp_path):
    page = (DOCS / "tutorials" / "compare.md").read_text()
    (tmp_path / "compare.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    follow("compare", SMALL, tiny.model)
    said = (tmp_path / "report" / "index.html").read_text()
    for method in ("LTE", "Deja Vu", "narrower dense"):
        assert method in said
    assert "Not done" not in said
    logs = [log.read_text() for log in tmp_path.glob("runs/sweep-compare/points/*.log")]
    assert logs
    assert not any("routers are as they were initialised" in log for log in logs)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("reviews")
def test_two_devices(follow, tiny, tmp_path):
    """The command starts the other process itself."""
    follow("devices", SMALL, tiny.model, alone=True)
    (results,) = tmp_path.glob("runs/*/*/results.json")
    assert json.loads(results.read_text())["versions"]["devices"] == 2


def test_each_tutorial_is_followed_here():
    pages = {page.stem for page in (DOCS / "tutorials").glob("*.md")}
    assert pages == {"own-classifier", "chat", "checkpoint", "compare", "devices"}
    for page in pages:
        made = notebook(page)
        assert made["nbformat"] == 4
        kinds = [cell["cell_type"] for cell in made["cells"]]
        assert kinds[0] == "markdown"
        assert "code" in kinds
        # three commands and five options at most
        shell = [c["source"] for c in made["cells"] if c["source"].startswith("%%bash")]
        commands = [line for code in shell for line in code.splitlines() if line.startswith(("lightning ", "lte "))]
        assert 1 <= len(commands) <= 3
        assert all(line.count(" --") <= 5 for line in commands)
