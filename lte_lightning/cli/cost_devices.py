"""``lte cost --devices``: what the stages of a fit take on several devices."""

from dataclasses import asdict
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from lte_lightning.core.accounting.fit import STRATEGIES, Machines, StageCost, stage_costs
from lte_lightning.core.accounting.memory import GIB
from lte_lightning.errors import UserError, meant
from lte_lightning.kernels.roofline import GPUS

GPU, LINK, UTILISATION = "H100 SXM", 50.0, 0.4


def check_devices(
    devices: int | None, gpu: str | None, link: float | None, utilisation: float | None, texts: int | None
) -> Machines | None:
    """Returns the devices that the command's options name, or None if they name none.

    Raises:
        UserError: If an option is wrong, or needs ``--devices``, which is missing.
    """
    given = {"gpu": gpu, "link": link, "utilisation": utilisation, "texts": texts}
    if devices is None:
        for name, value in given.items():
            if value is not None:
                raise UserError(f"--{name} {value} is about a fit on several devices; add --devices N")
        return None
    if devices < 1:
        raise UserError(f"--devices is {devices}; it must be at least 1")
    gpu, link = gpu or GPU, LINK if link is None else link
    utilisation = UTILISATION if utilisation is None else utilisation
    if gpu not in GPUS:
        raise UserError(f"unknown GPU {gpu!r}; there are {', '.join(GPUS)}{meant(gpu, GPUS)}")
    if not 0.0 < link < float("inf"):
        raise UserError(f"--link is {link}; it must be a bandwidth in GB/s, greater than 0")
    if not 0.0 < utilisation <= 1.0:
        raise UserError(
            f"--utilisation is {utilisation}; it is the share of the GPU's peak, greater than 0 and at most 1"
        )
    if texts is not None and texts < 1:
        raise UserError(f"--texts is {texts}; it must be at least 1")
    return Machines(devices, GPUS[gpu], 1e9 * link, utilisation)


def fit_costs(
    model: PreTrainedModel, batch_size: int, context: int, precision: str, machines: Machines, texts: int | None
) -> dict[str, Any]:
    """Returns what each stage takes under each strategy, as ``--json`` prints it.

    Args:
        model: A converted model.
        batch_size: Texts per device.
        context: Tokens of a text.
        precision: Lightning's name of it.
        machines: The devices.
        texts: Texts that a stage trains on, summed over its epochs; None if unknown.

    Raises:
        UserError: If the context is 0, the precision is unknown or the selector has no stages.
    """
    if context < 1:
        raise UserError("a fit has texts of at least one token: leave --context out, or give their length")
    texts_per_step = batch_size * machines.devices

    def figures(cost: StageCost) -> dict[str, Any]:
        steps = None if texts is None else -(-texts // texts_per_step)
        memory = cost.memory
        return {
            **asdict(memory),
            "total": memory.total(),
            "total_checkpointed": memory.total(checkpointing=True),
            "seconds_per_step": cost.step,
            "seconds_per_step_checkpointed": cost.step_checkpointed,
            "seconds_of_sending": cost.communication,
            "hours": None if steps is None or cost.step is None else steps * cost.step / 3600,
        }

    costs = {name: stage_costs(model, batch_size, context, precision, name, machines) for name in STRATEGIES}
    return {
        "devices": machines.devices,
        "gpu": machines.gpu.name,
        "link_gb_per_second": machines.link / 1e9,
        "utilisation": machines.utilisation,
        "precision": precision,
        "texts_per_step": texts_per_step,
        "tokens_per_device": batch_size * context,
        "texts": texts,
        **{name: {stage: figures(cost) for stage, cost in stages.items()} for name, stages in costs.items()},
    }


def fit_table(costs: dict[str, Any]) -> Table:
    """Returns a row for each strategy and stage: GiB of a device, and predicted time."""
    table = Table(
        title=f"a fit on {costs['devices']} x {costs['gpu']}, {costs['precision']}, per device "
        f"{costs['tokens_per_device']} tokens: GiB, and predicted time",
        title_justify="left",
    )
    names = {"weights": "weights", "gradients": "gradients", "optimizer": "AdamW", "shared": "shared"}
    names |= {"activations": "activations", "total": "total", "total_checkpointed": "checkpointed"}
    for column in ("strategy", "stage", *names.values(), "s a step", "hours"):
        table.add_column(column, justify="left" if column in ("strategy", "stage") else "right")
    for strategy in STRATEGIES:
        for stage, figures in costs[strategy].items():
            sizes = [f"{figures[name] / GIB:.2f}" for name in names]
            step, hours = figures["seconds_per_step"], figures["hours"]
            times = ["-" if step is None else f"{step:.3g}", "-" if hours is None else f"{hours:.3g}"]
            table.add_row(strategy, stage, *sizes, *times)
        table.add_section()
    table.caption = (
        f"shared: buckets of DDP, gathered layers of FSDP2. checkpointed: total with gradient checkpointing, a third "
        f"slower. Predicted at {costs['utilisation']:.0%} of the GPU's peak and {costs['link_gb_per_second']:g} GB/s "
        "between devices; validation, grouping and reading come on top."
    )
    table.caption_justify = "left"
    return table
