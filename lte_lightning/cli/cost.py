"""``lte cost``: the cost of a token at a sparsity, without loading the model's weights."""

from json import dumps

from lte_lightning.options import call


def main(args: list[str]) -> None:
    """Runs the command.

    Raises:
        UserError: If an argument is wrong; nothing is printed then.
    """
    call(cost, "lte cost", args, positional="model")


def cost(
    model: str,
    sparsity: float | None = None,
    dtype: str = "bf16",
    context: int | None = None,
    expert_size: int | None = None,
    batch_size: int = 1,
    precision: str = "bf16-mixed",
    devices: int | None = None,
    gpu: str | None = None,
    link: float | None = None,
    utilisation: float | None = None,
    texts: int | None = None,
    json: bool = False,
) -> None:
    """Shows the cost of a token, dense and at a sparsity, and the memory that training needs.

    lte cost RUN/model
    lte cost my-model --devices 8 --batch-size 4 --context 2048

    It prints FLOPs, weights and bytes per token, and the resulting bound on the speed-up of memory-bound decoding. No
    weights are loaded. With --devices it predicts memory and time of each stage of a fit under DDP and FSDP2;
    --sparsity is optional then.

    Args:
        model: Folder (plain or LTE), hub id, or config.json.
        sparsity: Share of the FFN neurons that do not run, in every layer. By default the one that a saved LTE model
            was measured at.
        dtype: Type of weights and KV cache: bf16, fp16 or fp32.
        context: Tokens attended to. By default 1024, or the model's maximum if that is less.
        expert_size: Neurons per expert of a plain model. By default 32.
        batch_size: Texts of that length per device, for the memory estimate.
        precision: Training precision, for the memory estimate: 64-true, 32-true, bf16-true, 16-true, bf16-mixed or
            16-mixed.
        devices: Devices of a fit, on all machines.
        gpu: Their kind, as "H100 SXM" (the default).
        link: Bandwidth from a device to the others, in GB/s (default 50). With several machines, that of their network.
        utilisation: Share of the GPU's peak that training reaches, by default 0.4.
        texts: Texts that each stage trains on, summed over its epochs; needed to predict hours.
        json: Print JSON instead of tables.

    Raises:
        UserError: If an option has an invalid value.
    """
    from rich.console import Console

    from lte_lightning.cli.cost_devices import check_devices, fit_table
    from lte_lightning.cli.cost_tables import cost_table, memory_table, work_out

    machines = check_devices(devices, gpu, link, utilisation, texts)
    costs = work_out(model, sparsity, dtype, context, expert_size, batch_size, precision, machines, texts)
    if json:
        print(dumps(costs, indent=2, allow_nan=False))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=100 if machines is None else 130)
    print(model)
    if "sparsity" in costs:
        console.print(cost_table(costs))
    console.print(memory_table(costs["training_memory"]) if machines is None else fit_table(costs["fit"]))
