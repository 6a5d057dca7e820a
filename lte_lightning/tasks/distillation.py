"""Distillation: the sparse model learns from the logits of a dense one, beside the labels."""

import copy
from typing import Any

import torch
from torch.nn import functional

from lte_lightning.core.model.convert import restore
from lte_lightning.core.model.exact import is_sharded
from lte_lightning.core.model.experts import expert_ffns
from lte_lightning.core.model.names import plain_names
from lte_lightning.core.model.sharding import reshard, shard, whole_state
from lte_lightning.core.model.swap import plain
from lte_lightning.data.packaged import resolve
from lte_lightning.errors import UserError
from lte_lightning.tasks.starting_model import load


def divergence(student_NC: torch.Tensor, teacher_NC: torch.Tensor) -> torch.Tensor:
    """Returns the mean over N rows of KL(teacher || student), or of the squared error of one output, a scalar.

    At temperature 1, as in Geoffrey Hinton, Oriol Vinyals, Jeff Dean: "Distilling the Knowledge in a Neural Network",
    2015, arXiv 1503.02531, section 2.

    Args:
        student_NC: Logits of C classes, or the prediction of a regression where C is 1.
        teacher_NC: The same of the teacher.
    """
    if student_NC.shape[-1] == 1:
        return functional.mse_loss(student_NC.float(), teacher_NC.float())
    log_student, log_teacher = (logits.float().log_softmax(-1) for logits in (student_NC, teacher_NC))
    return functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class Distillation:
    """The dense model that a module learns from, and its weight in the loss.

    The teacher is no part of the module: no optimizer, no strategy and no state dict sees it. One that was copied from
    the module's own model is kept in checkpoints.

    Args:
        share: Share of the task's loss, 0 to 1, that is divergence from the teacher; 0 for no teacher.
        source: Folder or hub id of the teacher; None for a copy of the model as the router stage finds it.

    Raises:
        UserError: If the share is outside 0 to 1, or a teacher is named while the share is 0.
    """

    def __init__(self, share: float, source: str | None) -> None:
        if not 0.0 <= share <= 1.0:
            raise UserError(f"distillation is {share}; it is a share of the loss, 0 to 1")
        if source is not None and not share:
            raise UserError(f"teacher is {source}, but distillation is 0, so it is unused; set distillation above 0")
        self.share = share
        self._source = source
        self._teacher: Any = None

    def enter(self, module: Any, stage: str) -> None:
        """Makes the teacher when the module leaves its dense stage, or begins after it.

        Raises:
            UserError: If none is named and the model is sparse already, or the one named has other outputs.
        """
        if stage == "dense" or not self.share or self._teacher is not None:
            return
        if self._source is not None:
            self._teacher = _ready(_load(module, self._source))
        elif module.stage == "dense":
            self._teacher = _copy(module.net)
        else:
            raise UserError(
                f"distillation is {self.share}, and the model begins in stage {module.stage!r}, so that it cannot "
                "teach itself; name the dense model that it came from (model.teacher)"
            )

    def saved(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: the weights of a teacher that lies in no folder."""
        copied = self._teacher is not None and self._source is None
        return {"teacher": whole_state(self._teacher)} if copied else {}

    def resume(self, module: Any, saved: dict[str, Any]) -> None:
        """Restores the teacher from the state of `saved`."""
        if "teacher" in saved:
            self._teacher = _copy(module.net, saved["teacher"])
        elif self._source is not None:
            self.enter(module, saved["stage"])

    def divergence(self, module: Any, batch: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor | None:
        """Returns how far a batch's outputs are from the teacher's; None without one, and in the dense stage."""
        if self._teacher is None or module.stage == "dense":
            return None
        if self._teacher.device != module.device:  # a checkpoint is read before the model is moved
            self._teacher.to(module.device)
        with torch.no_grad():
            answer = module.run_model(batch, self._teacher)
        return divergence(module.kept_logits(outputs, batch), module.kept_logits(answer, batch))


def _ready(net: Any) -> Any:
    return net.eval().requires_grad_(False)


def _copy(net: Any, state: dict[str, torch.Tensor] | None = None) -> Any:
    """Returns a dense model like this one, with its weights or with others; shared out over devices as it is."""
    if not is_sharded(net):
        with plain(net):
            copied = copy.deepcopy(net)
        if state is not None:
            copied.load_state_dict(state)
        return _ready(copied)
    reshard(net)
    if state is None:
        routers = tuple(f"{name}.selector." for name in expert_ffns(net))
        named = plain_names(expert_ffns(net), whole_state(net))
        state = {key: value for key, value in named.items() if not key.startswith(routers)}
    fresh = net.plain_class(copy.deepcopy(net.config))
    fresh.load_state_dict(state)
    shard(_ready(fresh.to(net.device)), next(net.parameters()).device_mesh)
    return fresh


def _load(module: Any, source: str) -> Any:
    net, _ = load(module.auto_class, resolve(source), module.model_arguments(), None, module.hparams["seed"])
    if expert_ffns(net):
        restore(net)
    for name in ("num_labels", "vocab_size"):
        ours, theirs = getattr(module.net.config, name, None), getattr(net.config, name, None)
        if ours != theirs:
            raise UserError(
                f"model.teacher {source} has {name} {theirs}, and the model has {ours}; they must predict the same"
            )
    return net
