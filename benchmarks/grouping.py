"""Times the balanced k-means on matrices of real size and compares its inertia with random and k-means-constrained."""

import argparse
import time

import torch
from torch.nn.functional import normalize

from lte_lightning.core.model.grouping import expert_count, group_neurons


def structured(neurons: int, width: int, seed: int) -> torch.Tensor:
    """Returns a matrix like trained weights: half of its variance lies in a subspace of 64 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    low_rank = torch.randn(neurons, 64, generator=generator) @ torch.randn(64, width, generator=generator) / 8
    return low_rank + torch.randn(neurons, width, generator=generator)


def gaussian(neurons: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(neurons, width, generator=torch.Generator().manual_seed(seed))


def safetensors_layers(path: str, key: str) -> list[tuple[str, torch.Tensor]]:
    from safetensors.torch import load_file

    layers = [(name, weight) for name, weight in load_file(path).items() if key in name]
    if not layers:
        raise SystemExit(f"{path} has no tensor whose name contains {key!r}: set --key")
    return layers


def measure(name: str, weight: torch.Tensor, args: argparse.Namespace, reference: bool) -> None:
    start = time.perf_counter()
    grouping = group_neurons(weight, args.expert_size, seed=args.seed)
    seconds = time.perf_counter() - start
    neurons, width = weight.shape
    line = f"{name}  {neurons} x {width}: {seconds:6.2f} s, inertia {grouping.inertia:9.2f}"
    line += f", {1 - grouping.inertia / grouping.random_inertia:6.2%} below random"
    if reference:
        from k_means_constrained import KMeansConstrained

        size = args.expert_size
        package = KMeansConstrained(
            expert_count(neurons, size),
            size_min=size,
            size_max=size,
            n_init=1,
            max_iter=args.reference_iterations,
            random_state=args.seed,
        )
        start = time.perf_counter()
        package.fit(normalize(weight.float(), dim=1).numpy())
        seconds = time.perf_counter() - start
        line += f"; k-means-constrained {seconds:.2f} s, {package.n_iter_} iterations, inertia {package.inertia_:.2f}"
        line += f" ({grouping.inertia / package.inertia_ - 1:+.2%} for ours)"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of matrices and clusterings (default: %(default)s)")
    parser.add_argument("--expert-size", type=int, default=32, help="neurons per expert (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12, help="base matrices of each kind (default: %(default)s)")
    parser.add_argument(
        "--base", type=int, nargs=2, default=(3072, 768), metavar=("F", "D"), help="shape (default: 3072 768)"
    )
    parser.add_argument(
        "--large",
        type=int,
        nargs=2,
        default=(11008, 4096),
        metavar=("F", "D"),
        help="shape of the large matrix (default: 11008 4096, a gate of LLaMA-2-7B)",
    )
    parser.add_argument("--skip-large", action="store_true", help="leave the large matrix out")
    parser.add_argument(
        "--reference", action="store_true", help="run k-means-constrained on the first of each kind of base matrix"
    )
    parser.add_argument("--reference-large", action="store_true", help="run it on the large matrix (very slow)")
    parser.add_argument(
        "--reference-iterations", type=int, default=100, help="its most iterations (default: %(default)s)"
    )
    parser.add_argument("--weights", metavar="FILE", help="group the layers of this safetensors file, nothing else")
    parser.add_argument("--key", default="intermediate.dense.weight", help="part of their names (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    if args.weights:
        for name, weight in safetensors_layers(args.weights, args.key):
            measure(name, weight, args, args.reference)
        return
    for make in (structured, gaussian):
        start = time.perf_counter()
        for layer in range(args.layers):
            measure(f"{make.__name__} {layer}", make(*args.base, args.seed + layer), args, args.reference and not layer)
        print(f"{make.__name__}: {args.layers} layers in {time.perf_counter() - start:.1f} s", flush=True)
    if not args.skip_large:
        for make in (structured, gaussian):
            measure(f"{make.__name__} large", make(*args.large, args.seed), args, args.reference_large)


if __name__ == "__main__":
    main()
