"""``lte init``: a configuration for your own data, after looking at them."""

from pathlib import Path
from typing import Literal

from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command; its first words may be the folder and the data.

    Raises:
        UserError: If the data or the model cannot be used.
    """
    words = list(args)
    for place, option in enumerate(("--folder", "--data")):
        if len(words) <= 2 * place or words[2 * place].startswith("-"):
            break
        words.insert(2 * place, option)
    call(init, "lte init", words)


def init(
    folder: str,
    data: str,
    model: str | None = None,
    task: Literal["auto", "classification", "chat", "text"] = "auto",
    text: str | None = None,
    label: str | None = None,
) -> None:
    """Writes config.yaml for your data into a folder, commented and ready for `lightning fit`.

    lte init FOLDER DATA

    It looks at the data's columns, classes and lengths and at the model's sizes, and fails where a fit would.

    Args:
        folder: Folder of the configuration; it is made if it is missing. A config.yaml is never overwritten.
        data: File, folder or hub id. Files are csv, tsv, jsonl, json or parquet, and txt or md of running text.
        model: Folder or hub id. By default MiniLM for classification, else SmolLM2-135M.
        task: A classifier, answers to prompts, or a language model. By default the columns decide.
        text: Column of the text to classify, of running text, or of prompts. By default that of the longest texts.
        label: Column of the classes, or of the answers to prompts. A column of classes is found by a name such as label
            or stars, or by its few values.
    """
    from lte_lightning.cli.inspect_data import configuration_for
    from lte_lightning.errors import UserError
    from lte_lightning.files import write_text, writing

    file = Path(folder) / "config.yaml"
    if file.exists():
        raise UserError(f"{file} exists already; choose another folder, or remove it")
    configuration = configuration_for(data, model, task, text, label)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, configuration)
    print(configuration, end="")
    print(f"\nlightning fit --config {file}")
