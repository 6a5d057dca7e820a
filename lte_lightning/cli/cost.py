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

    FLOPs, weights and bytes per token, and the speed-up bound of memory-bound decoding that follows. No weights are
    loaded. With --devices, memory and time of each stage of a fit, under DDP and FSDP2; no sparsity need be known then.

    Args:
        model: Folder (plain or LTE), hub id, or config.json; the option's name may be left out.
        sparsity: Share of the FFN neurons that do not run, in every layer. By default as a saved LTE model measured.
        dtype: Of weights and KV cache: bf16, fp16, fp32.
        context: Tokens attended to. By default 1024, or all that the model allows.
        expert_size: Neurons per expert of a plain model. By default 32.
        batch_size: Texts of that length per device, for the memory.
        precision: For the memory: 64-true, 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed.
        devices: Devices of a fit, on all machines.
        gpu: Their kind, as "H100 SXM" (the default).
        link: GB a second that a device sends to others, by default 50; of several machines their network's.
        utilisation: Share of the GPU's peak that training reaches, by default 0.4.
        texts: Texts that each stage is trained on, all passes together, for the hours.
        json: Print JSON instead of tables.

    Raises:
        UserError: If an option's value is not one.
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
