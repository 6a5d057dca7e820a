"""A saved model in MLflow: logged with its signature, and loaded by ``mlflow.pyfunc.load_model`` with its experts."""

import contextlib
import hashlib
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from lte_lightning.core.model.folder import CONFIG_FILE
from lte_lightning.core.model.head import classifies
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.errors import UserError
from lte_lightning.quiet import without_remarks

BATCH = 32  # rows per forward pass
MAX_NEW_TOKENS = 64  # default length of an answer; the parameter of this name overrides it
_DIGEST = "lte.digest"
_PACKAGES = ("lte-lightning", "torch", "transformers")


class LteModel:
    """The model inside ``mlflow.pyfunc.load_model``: it takes texts and returns answers.

    Args:
        folder: A saved LTE model with its tokenizer.
    """

    def __init__(self, folder: str) -> None:
        self.model = from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = type(self.model).__name__
        if not classifies(kind) and not self.model.can_generate():
            raise UserError(f"{folder} is a {kind}: MLflow serves classifiers and models that write")

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> Any:
        """Returns a row of answers for each row of texts.

        Args:
            model_input: A data frame with one column of texts, or two for pairs.
            params: ``max_new_tokens`` of an answer.

        Returns:
            A data frame: ``label`` and ``probability`` of a classifier, ``value`` of a regression model, ``text`` of a
            generator.
        """
        import pandas

        columns = [[str(text) for text in model_input[name]] for name in model_input.columns[:2]]
        answers: list[dict[str, Any]] = []
        for first in range(0, len(columns[0]), BATCH):
            answers += self._answer([column[first : first + BATCH] for column in columns], params or {})
        return pandas.DataFrame(answers)

    @torch.inference_mode()
    def _answer(self, columns: list[list[str]], params: dict[str, Any]) -> list[dict[str, Any]]:
        if self.model.can_generate() and not classifies(type(self.model).__name__):
            return [{"text": self._write(text, params)} for text in columns[0]]
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 512))
        batch = self.tokenizer(*columns, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        logits_BC = self.model(**batch).logits.float()
        if logits_BC.shape[1] == 1:
            return [{"value": value} for value in logits_BC[:, 0].tolist()]
        shares, classes = logits_BC.softmax(dim=1).max(dim=1)
        names = self.model.config.id2label
        return [
            {"label": names[number], "probability": share}
            for number, share in zip(classes.tolist(), shares.tolist(), strict=True)
        ]

    def _write(self, prompt: str, params: dict[str, Any]) -> str:
        inputs = self.tokenizer(prompt, return_token_type_ids=False, return_tensors="pt")
        count = int(params.get("max_new_tokens", MAX_NEW_TOKENS))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        ids_BT = self.model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=pad)
        skipped = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        return str(self.tokenizer.decode(ids_BT[0, skipped:], skip_special_tokens=True))


def _load_pyfunc(path: str) -> LteModel:
    """Loads a logged model; MLflow calls it by this name."""
    return LteModel(path)


def log_model(client: Any, run_id: str, folder: Path, columns: list[str], kind: str, register_as: str | None) -> None:
    """Adds a saved model to a run as a logged model, unless the run already has it.

    Args:
        client: MLflow's client.
        run_id: The run.
        folder: The saved model.
        columns: Names of the text columns.
        kind: ``classification``, ``regression`` or ``text``.
        register_as: The registered model that gets this model as a new version.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    with without_remarks("mlflow"):
        from mlflow import pyfunc
        from mlflow.models.model import Model

    digest, run = _hash_of(folder), client.get_run(run_id)
    known = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    if any(model.tags.get(_DIGEST) == digest for model in known):
        return
    signature, example = _signature(columns, kind)
    tags = {_DIGEST: digest} | {key: value for key, value in run.data.tags.items() if key.startswith("lte.")}
    # MLflow's own functions use one store for the whole process, the client does not
    logged = client.create_logged_model(run.info.experiment_id, "sparse-model", run_id, tags)
    with tempfile.TemporaryDirectory() as staging, without_remarks("mlflow"):
        pyfunc.save_model(
            f"{staging}/model",
            loader_module=__name__,
            data_path=str(folder),
            mlflow_model=Model(run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id),
            signature=signature,
            input_example=example,
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _PACKAGES],
        )
        client.log_model_artifacts(logged.model_id, f"{staging}/model")
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    if register_as:
        with contextlib.suppress(MlflowException):  # it is there already
            client.create_registered_model(register_as)
        client.create_model_version(register_as, logged.artifact_location, run_id, model_id=logged.model_id)


def _hash_of(folder: Path) -> str:
    """Returns a digest that differs between saved models, because the description has a digest of all weights."""
    return hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest()[:16]


def _signature(columns: list[str], kind: str) -> tuple[Any, Any]:
    import pandas
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    answers: dict[str, list[ColSpec | TensorSpec]] = {
        "classification": [ColSpec("string", "label"), ColSpec("double", "probability")],
        "regression": [ColSpec("double", "value")],
        "text": [ColSpec("string", "text")],
    }
    outputs = answers[kind]
    inputs = Schema([ColSpec("string", name) for name in columns])
    example = pandas.DataFrame([{name: "An example text." for name in columns}])
    if kind != "text":
        return ModelSignature(inputs, Schema(outputs)), example
    params = ParamSchema([ParamSpec("max_new_tokens", DataType.long, MAX_NEW_TOKENS)])
    return ModelSignature(inputs, Schema(outputs), params), example
