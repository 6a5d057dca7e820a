"""The card of a saved model, and what is uploaded, to a stand-in for the hub that speaks its HTTP."""

import base64
import contextlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import close_session
from transformers import AutoModelForSequenceClassification

from lte_lightning import LteConfig, convert, from_pretrained, save_pretrained, set_mode
from lte_lightning.cli import main
from lte_lightning.errors import UserError

ABOUT = {
    "stage": "expert",
    "recipe": {"efficiency_weight": 0.5},
    "results": {
        "task": "sst2",
        "data": "stanfordnlp/sst2",
        "metric": "accuracy",
        "dense": 0.882,
        "hard": 0.88,
        "floor": 0.853,
        "sparsity": 0.612,
        "sparsity_per_layer": [0.5, 0.724],
        "flops_per_token": 2**29,
        "dense_flops_per_token": 2**30,
        "seed": 3,
        "versions": {"torch": "2.13.0", "commit": "abc123"},
    },
}


@pytest.fixture
def model(build):
    model = convert(build(), LteConfig(16), progress=False)
    set_mode(model, "hard")
    return model


def test_a_card_says_what_was_measured(model, tmp_path):
    folder = save_pretrained(model, tmp_path / "saved", ABOUT)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "lte-lightning" in card.data.tags
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("sst2", "accuracy", 0.88)
    for line in (
        "Task sst2, validation rows. Data: stanfordnlp/sst2.",
        "| dense, before routing | 0.8820 | 0.0 % | 1.0000 |",
        "| selected experts | 0.8800 | 61.2 % | 0.5000 |",
        "| no expert at all, the floor | 0.8530 | 100.0 % | - |",
        "in per cent and the model's order: 50.0, 72.4.",
        "| efficiency_weight | 0.5 |",
        "| commit | abc123 |",
        "compute the **dense** function",
    ):
        assert line in card.text
    assert str(tmp_path) not in card.content


def test_a_card_without_figures_says_so(model, tmp_path):
    text = (save_pretrained(model, tmp_path / "saved") / "README.md").read_text()
    assert "Nothing was measured when this model was saved." in text
    assert "licence of the base model | not known" in text


def test_the_base_model_and_its_licence_travel(build, tmp_path):
    build().save_pretrained(tmp_path / "my-base")
    (tmp_path / "my-base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    plain = type(build()).from_pretrained(tmp_path / "my-base")
    first = save_pretrained(convert(plain, LteConfig(16), progress=False), tmp_path / "first")
    second = save_pretrained(from_pretrained(first), tmp_path / "second")
    for folder in (first, second):
        card = ModelCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0"
        assert "| base model | my-base |" in card.text
    assert (second / "README.md").read_bytes() == (first / "README.md").read_bytes()


@pytest.mark.parametrize("name", ["/gone/since/then", "someone/not-in-the-cache", "a b?", "."])
def test_a_base_model_that_is_not_there(model, tmp_path, name):
    model.config._name_or_path = name
    folder = save_pretrained(model, tmp_path / "saved")
    assert "/gone" not in (folder / "README.md").read_text()
    assert from_pretrained(folder).lte_base["license"] is None


def test_a_card_is_named_by_the_base_model(build, tmp_path):
    build().save_pretrained(tmp_path / "my-base" / "model")  # as a run or a package keeps it
    plain = type(build()).from_pretrained(tmp_path / "my-base" / "model")
    results = {"task": "reviews", "metric": "accuracy", "hard": 0.9}
    folder = tmp_path / "saved"
    save_pretrained(convert(plain, LteConfig(16), progress=False), folder, {"results": results})
    card = ModelCard.load(folder / "README.md")
    assert card.data.model_name == "my-base-sparse"
    assert "| base model | my-base |" in card.text


def test_a_folder_that_is_not_there_is_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "sparse-bert")
    for name in ("sparse-brt", "./sparse-brt"):
        with contextlib.chdir(tmp_path), pytest.raises(UserError) as refused:
            from_pretrained(name)
        assert str(refused.value).startswith(f"no folder {name} (do you mean 'sparse-bert'?)")
    (tmp_path / "run").mkdir()
    model.save_pretrained(tmp_path / "run" / "model")
    assert from_pretrained(tmp_path / "run").lte_config == model.lte_config  # a run's folder
    with pytest.raises(UserError, match="is a file; name the folder of a model"):
        from_pretrained(tmp_path / "sparse-bert" / "config.json")
    with pytest.raises(TypeError, match="name a model by its folder or its id on the hub, not by None"):
        from_pretrained(None)


def test_a_card_of_your_own_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    written = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").write_text(written.replace("sparse", "changed"))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == written


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs."""

    files: dict[str, bytes]

    def do_POST(self) -> None:
        body, code = self.rfile.read(int(self.headers["Content-Length"])), 200
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            answer = {"url": f"https://huggingface.co/{name}", "id": name, "name": name}
        elif "/forbidden/" in self.path:
            answer, code = {"error": "You don't have the rights"}, 403
        elif self.path == "/api/validate-yaml":
            assert yaml.safe_load(json.loads(body)["content"].split("---")[1])["tags"]
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {"commitUrl": "https://huggingface.co/me/sparse/commit/1", "commitOid": "1", "success": True}
        self._answer(answer, code)

    def do_GET(self) -> None:
        self._answer({"id": "me/sparse", "siblings": [], "sha": "0"}, 200)

    def _answer(self, answer: dict, code: int) -> None:
        text = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    """The files that reach the stand-in."""
    monkeypatch.setattr(Hub, "files", {}, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    close_session()
    yield Hub.files
    server.shutdown()
    thread.join()
    server.server_close()
    close_session()


def test_push_to_hub(model, hub, tmp_path):
    model.push_to_hub("me/sparse", token="hf_x", tags=["mine"])
    model.save_pretrained(tmp_path / "saved")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert {name: data for name, data in hub.items() if name != "README.md"} == {
        name: data for name, data in saved.items() if name != "README.md"
    }
    card = ModelCard(hub["README.md"].decode())
    assert 'lte_lightning.from_pretrained("me/sparse")' in card.text
    assert "mine" in card.data.tags


def test_a_hub_that_is_out_of_reach_is_one_line(model, tmp_path, monkeypatch):
    def push() -> None:
        model.push_to_hub("me/sparse")

    def save() -> None:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/sparse")

    for call in (push, save):
        with pytest.raises(
            UserError, match=r"cannot upload to me/sparse: .*offline.*leave HF_HUB_OFFLINE unset"
        ) as refused:
            call()
        assert refused.value.__suppress_context__  # none of the hub's traceback
        assert len(str(refused.value).splitlines()) == 1
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    close_session()
    with pytest.raises(UserError, match="cannot upload to me/sparse: "):
        model.push_to_hub("me/sparse")
    close_session()


def test_saving_with_push_to_hub(model, hub, tmp_path):
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/sparse", token="hf_x")
    assert {"lte_config.json", "lte_routers.safetensors", "model.safetensors", "README.md"} <= set(hub)


def test_lte_push(model, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    folder = save_pretrained(model, tmp_path / "saved", ABOUT)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    main(["push", str(folder), "me/sparse", "--private"])
    assert capsys.readouterr().out.strip().endswith("/commit/1")
    assert set(hub) == {path.name for path in folder.iterdir()} - {"checkpoint-3", "optimizer.pt"}
    with pytest.raises(SystemExit):
        main(["push", str(folder), "me/forbidden"])
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: cannot upload to me/forbidden: 403 Forbidden")
    assert "hf_x" not in said
    assert "Traceback" not in said


def test_lte_push_to_a_folder_in_the_form_of_the_hub_s_cache(model, tmp_path, capsys):
    folder = save_pretrained(model, tmp_path / "saved", ABOUT)
    (folder / "optimizer.pt").write_bytes(b"")
    for _ in range(2):  # the same files are the same commit
        main(["push", str(folder), "me/sparse", "--cache", str(tmp_path / "cache")])
    place = Path(capsys.readouterr().out.splitlines()[-1])
    (other,) = (tmp_path / "cache" / "models--me--sparse" / "snapshots").iterdir()
    assert other == place
    assert {path.name for path in place.iterdir()} == {path.name for path in folder.iterdir()} - {"optimizer.pt"}
    assert 'lte_lightning.from_pretrained("me/sparse")' in (place / "README.md").read_text()
    ids = torch.tensor([[5, 6, 7]])
    sparse = from_pretrained("me/sparse", cache_dir=tmp_path / "cache")
    assert torch.equal(sparse(ids).logits, from_pretrained(folder)(ids).logits)
    dense = AutoModelForSequenceClassification.from_pretrained("me/sparse", cache_dir=tmp_path / "cache")
    assert torch.equal(dense(ids).logits, AutoModelForSequenceClassification.from_pretrained(folder)(ids).logits)


def test_lte_push_of_what_cannot_be_pushed(model, tmp_path, capsys, build):
    folder = save_pretrained(model, tmp_path / "saved")
    build().save_pretrained(tmp_path / "plain")
    for words, message in (
        ([str(folder), "me/sparse"], "cannot upload to me/sparse: .*offline"),
        (
            [str(folder), "./me/sparse"],
            "the repository is './me/sparse', but must be OWNER/NAME; .* add --cache FOLDER",
        ),
        ([str(folder), "me/sparse", "--cache", "x", "--private"], "is neither private nor has pull requests"),
        ([str(tmp_path / "plain"), "me/sparse"], "plain is no folder of a saved LTE model"),
        ([str(tmp_path / "none"), "me/sparse"], "none is no folder of a saved LTE model"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(["push", *words])
        assert exit_.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        assert re.search(message, lines[-1]), lines
