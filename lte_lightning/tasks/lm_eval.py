"""The model ``lte`` of the lm-evaluation-harness: its own command and functions on saved LTE models.

From the shell, with every option of ``lm_eval``: ``python -m lte_lightning.tasks.lm_eval --model lte --model_args
pretrained=RUN --tasks arc_easy``. From Python, ``import lte_lightning.tasks.lm_eval``, and then
``lm_eval.simple_evaluate(model="lte", model_args="pretrained=RUN", ...)``.

The import registers the model. lm_eval 0.4.13 looks for none in other packages (its ``--include_path`` is for tasks),
so its own script does not know it.
"""

import sys
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import get_dtype

from lte_lightning.core.model.folder import find_model
from lte_lightning.core.model.loading import from_pretrained
from lte_lightning.errors import UserError

# Of lm_eval's model `hf`: what would load another model than the saved one, or share it out
_REFUSED = ("parallelize", "tp_plan", "peft", "delta", "autogptq", "gptqmodel", "gguf_file", "quantization_config")


@register_model("lte")
class LteLM(HFLM):
    """A saved LTE model in the mode that it was saved in.

    Args:
        pretrained: Its folder, a run's folder, or a hub id.
        kernels: What computes the selected experts, a backend of `set_backend`.
        **options: As of lm_eval's model ``hf``: ``dtype``, ``device``, ``batch_size``, ``revision``, ...

    Raises:
        UserError: If the model cannot be loaded, or an option would load another one.
    """

    def __init__(self, pretrained: str, kernels: Any = "auto", **options: Any) -> None:
        if wrong := [name for name in _REFUSED if options.get(name)]:
            raise UserError(f"the model lte does not take {', '.join(wrong)}")
        self._kernels = kernels
        super().__init__(pretrained=find_model(pretrained), **options)

    def _create_model(self, pretrained: str, **options: Any) -> None:
        names = ("revision", "subfolder", "device_map", "attn_implementation")
        kept = {name: options[name] for name in names if options.get(name)}
        self._model = from_pretrained(pretrained, backend=self._kernels, dtype=get_dtype(options["dtype"]), **kept)


def main() -> None:
    """Runs lm_eval's own command."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
