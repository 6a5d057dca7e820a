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
    json: bool = False,
) -> None:
    """Shows the cost of a token, dense and at a sparsity, and the memory that training needs.

    lte cost RUN/model

    FLOPs, weights and bytes per token, and the speed-up bound of memory-bound decoding that follows. No weights are
    loaded.

    Args:
        model: Folder (plain or LTE), hub id, or config.json; the option's name may be left out.
        sparsity: Share of the FFN neurons that do not run, in every layer. By default as a saved LTE model measured.
        dtype: Of weights and KV cache: bf16, fp16, fp32.
        context: Tokens attended to. By default 1024, or all that the model allows.
        expert_size: Neurons per expert of a plain model. By default 32.
        batch_size: Texts of that length per device, for the memory.
        precision: For the memory: 64-true, 32-true, bf16-true, 16-true, bf16-mixed or 16-mixed.
        json: Print JSON instead of tables.

    Raises:
        UserError: If an option's value is not one.
    """
    from rich.console import Console

    from lte_lightning.cli.cost_tables import cost_table, memory_table, work_out

    costs = work_out(model, sparsity, dtype, context, expert_size, batch_size, precision)
    if json:
        print(dumps(costs, indent=2, allow_nan=False))
        return
    console = Console()
    console = console if console.is_terminal else Console(width=100)
    print(model)
    console.print(cost_table(costs))
    console.print(memory_table(costs["training_memory"]))
