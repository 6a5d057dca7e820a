"""What each stage of a fit takes on several devices, memory and time, worked out before it starts."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from lte_lightning.core.accounting.cost import token_cost
from lte_lightning.core.accounting.memory import PRECISIONS, TrainingMemory, training_memory
from lte_lightning.core.model.convert import lte_config, selector_parameters
from lte_lightning.core.model.experts import require_expert_ffns
from lte_lightning.core.routing.observe import imitates, learns
from lte_lightning.errors import UserError
from lte_lightning.kernels.roofline import Gpu

STRATEGIES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Machines:
    """The devices of a fit.

    Args:
        devices: Their number, on all machines.
        gpu: The kind of each.
        link: Bytes a second that each of them sends; of several links that data go through, the slowest.
        utilisation: Share of the GPU's peak that its products reach.
    """

    devices: int
    gpu: Gpu
    link: float
    utilisation: float


@dataclass(frozen=True)
class StageCost:
    """What a stage takes of one device.

    Args:
        memory: At its peak.
        step: Predicted seconds of an optimizer step of one batch per device, and with gradient checkpointing; None
            where the peak of the precision is not known.
        communication: Seconds of it in which data are sent, while the device computes.
    """

    memory: TrainingMemory
    step: float | None
    step_checkpointed: float | None
    communication: float


def stage_costs(
    model: PreTrainedModel, batch_size: int, context: int, precision: str, strategy: str, machines: Machines
) -> dict[str, StageCost]:
    """Predicts what each stage takes: dense, router (all experts, routers learn), expert (frozen routers).

    A step takes the longer of computing and sending, which go on at once, and what AdamW reads and writes after them:

    - computing: three times the forward pass's FLOPs, four times with gradient checkpointing; routers that are frozen
      count once. Every expert is computed in all stages, as a GPU does. A token attends to the whole context: what
      attention costs is too much by half for a causal model.
    - sending: of N devices each sends ``2 (N-1)/N`` of the gradients' bytes under DDP. Under FSDP2 it gathers all
      weights twice and sends its gradients once, ``(N-1)/N`` each.

    Validation, grouping, reading data and saving come on top.

    Args:
        model: A converted model, which may be on the meta device. Its routers train again afterwards.
        batch_size: Texts in a batch of a device.
        context: Tokens of each.
        precision: Lightning's name of it.
        strategy: ``ddp`` or ``fsdp2``.
        machines: The devices.

    Raises:
        UserError: If the precision is unknown, or the selector does not learn together with the model.
    """
    if not learns(model) or imitates(model):
        raise UserError(
            f"selector {lte_config(model).selector!r} does not learn with the task, so its fit has no stages to count; "
            "count LTE's router, or a plain model"
        )
    tokens = batch_size * context
    dense = token_cost(model, context=context).flops
    routers = token_cost(model, [0.0] * len(require_expert_ffns(model)), context=context).flops - dense
    found = {}
    for stage, learning in (("dense", False), ("router", True), ("expert", False)):
        for parameter in selector_parameters(model):
            parameter.requires_grad_(learning)
        memory = training_memory(
            model, tokens, precision, soft=learning, devices=machines.devices, sharded=strategy == "fsdp2"
        )
        aside = 0 if stage == "dense" else routers
        plain, again = (n * dense + (n if learning else 1) * aside for n in (3, 4))
        sent = _sent(model, precision, strategy, machines.devices) / machines.link
        plain_s, again_s = (_step(tokens * flops, sent, memory, precision, machines) for flops in (plain, again))
        found[stage] = StageCost(memory, plain_s, again_s, sent)
    for parameter in selector_parameters(model):
        parameter.requires_grad_(True)
    return found


def _sent(model: PreTrainedModel, precision: str, strategy: str, devices: int) -> float:
    """Bytes that a device sends in a step."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    values = 2 * weights + trained if strategy == "fsdp2" else 2 * trained
    return PRECISIONS[precision][0] * values * (devices - 1) / devices


def _step(flops: float, sent: float, memory: TrainingMemory, precision: str, machines: Machines) -> float | None:
    peak = {2: machines.gpu.flops_16, 4: machines.gpu.flops_32}.get(PRECISIONS[precision][1])
    if peak is None:
        return None
    update = (3 * memory.gradients + 2 * memory.optimizer) / machines.gpu.bandwidth
    return max(flops / (peak * machines.utilisation), sent) + update
