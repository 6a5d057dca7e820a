"""The model `lte` in lm_eval's registry: what lm_eval's own functions and command find is what `lte harness` finds."""

import json
import subprocess
import sys

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import lte_lightning
from lte_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")  # what the harness and its own dependencies warn of
lm_eval = pytest.importorskip("lm_eval", reason='needs the extra "harness": pip install "lte-lightning[harness]"')


@pytest.fixture(scope="module")
def run(make_lm_tokenizer, tmp_path_factory):
    """A run's folder; in hard mode its model answers otherwise than in dense mode."""
    folder, tokenizer = tmp_path_factory.mktemp("run"), make_lm_tokenizer(pad_token="<unk>")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
    options = lte_lightning.LteConfig(expert_size=8, router_margin=0.1, router_scale=2.0)
    lte_lightning.convert(model, options, progress=False)
    lte_lightning.set_mode(model, "hard")
    lte_lightning.save_pretrained(model, folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture
def meals(harness_task, tmp_path):
    """A folder with the harness's task `meals`."""
    texts = ["the cat", "the dog", "the owl", "a fish", "a bird", "the cow"]
    choices = [" a cat", " a fish", " the dog"]
    rows = [{"question": f"{text} eats", "choices": choices, "answer": i % 3} for i, text in enumerate(texts)]
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "meals.yaml").write_text(yaml.safe_dump(harness_task(rows, "acc", "brier_score")))
    return tmp_path / "own"


def evaluate(meals, model, arguments):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(meals), include_defaults=False)
    options = {"tasks": ["meals"], "task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
    return lm_eval.simple_evaluate(model=model, model_args=arguments, **options)["results"]["meals"]


def test_lm_eval_finds_the_model_by_its_name(run, meals):
    import lte_lightning.tasks.lm_eval  # noqa: F401  # registers it
    from lte_lightning.tasks.harness import evaluate_saved

    ours = evaluate_saved(str(run / "model"), ["meals"], str(meals), bootstrap_iters=0)["meals"]
    sparse = evaluate(meals, "lte", f"pretrained={run}")
    assert sparse["brier_score,none"] == pytest.approx(ours["brier_score,none"])
    dense = evaluate(meals, "hf", f"pretrained={run / 'model'}")
    assert dense["brier_score,none"] != pytest.approx(ours["brier_score,none"])


def test_options_that_would_load_another_model_are_refused(run):
    from lte_lightning.tasks.lm_eval import LteLM

    with pytest.raises(UserError, match="does not take parallelize, gguf_file"):
        LteLM(str(run), parallelize=True, gguf_file="model.gguf")
    with pytest.raises(UserError, match=r"no folder \./nowhere"):
        LteLM("./nowhere")
    with pytest.raises(UserError, match="unknown backend 'gpu'"):
        LteLM(str(run), kernels="gpu", device="cpu")


def test_lm_evals_own_command(run, meals, tmp_path):
    words = ["--model", "lte", "--model_args", f"pretrained={run}", "--tasks", "meals", "--include_path", str(meals)]
    words += ["--device", "cpu", "--output_path", str(tmp_path / "out.json")]
    command = [sys.executable, "-m", "lte_lightning.tasks.lm_eval", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("out*.json")
    assert "brier_score,none" in json.loads(file.read_text())["results"]["meals"]
