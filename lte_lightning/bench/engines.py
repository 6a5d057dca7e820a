"""Other inference engines for the dense model: their names, the packages they need, and how each is started."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from lte_lightning.bench import llama_cpp
from lte_lightning.bench.graphs import start_onnxruntime, start_openvino
from lte_lightning.bench.jobs import Job, Started
from lte_lightning.errors import UserError, meant

NNCF = ("nncf",)
PIP = 'pip install "lte-lightning[bench]"'


@dataclass(frozen=True)
class Engine:
    """An engine for ``--against``.

    Args:
        name: Its name on the command line.
        packages: Modules that it needs.
        start: Starts it with weights of one type.
        types: The types that it supports, each with the further modules that it needs.
    """

    name: str
    packages: tuple[str, ...]
    start: Callable[[Job, str], Started]
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def missing(self, dtype: str) -> list[str]:
        """Returns the packages that are not installed."""
        return [name for name in (*self.packages, *self.types[dtype]) if not _is_there(name)]

    @property
    def version(self) -> str:
        """Version of its first package; empty if unknown."""
        try:
            return version(self.packages[0])
        except PackageNotFoundError:
            return ""


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module without a spec, such as a stand-in
        return False


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("llama.cpp", ("xllamacpp", "gguf"), llama_cpp.start, dict.fromkeys(("f32", "bf16", "int8", "int4"), ())),
        Engine(
            "openvino", ("openvino",), start_openvino, {"f32": (), "bf16": (), "int8": ("nncf",), "int4": ("nncf",)}
        ),
        # its CPU kernels do not multiply bfloat16
        Engine("onnxruntime", ("onnxruntime", "onnx", "onnxscript"), start_onnxruntime, {"f32": (), "int8": ()}),
    )
}


def find_engines(names: str) -> list[Engine]:
    """Returns engines by their names, separated by commas.

    Raises:
        UserError: If a name is unknown.
    """
    engines = {}
    for name in names.split(","):
        if name.strip() not in ENGINES:
            near = meant(name.strip(), ENGINES, "; did you mean {}?") or f"; there are {', '.join(ENGINES)}"
            raise UserError(f"unknown engine {name.strip()!r} in --against{near}")
        engines[name.strip()] = ENGINES[name.strip()]
    return list(engines.values())


def start_all(
    engines: Sequence[Engine], job: Job, dtypes: Sequence[str]
) -> tuple[dict[tuple[str, str], Started], list[str]]:
    """Starts each engine with every type that it supports.

    Returns:
        The started engines by name and type, and a line for each that could not start, with the reason.
    """
    started, reasons = {}, []
    for engine in engines:
        if missing := engine.missing(next(iter(engine.types))):
            reasons.append(f"{engine.name} is not measured: {_absent(missing)}")
            continue
        for dtype in dtypes:
            if dtype not in engine.types:
                reasons.append(f"{engine.name} is not measured in {dtype}: it supports {', '.join(engine.types)}")
            elif missing := engine.missing(dtype):
                reasons.append(f"{engine.name} is not measured in {dtype}: {_absent(missing)}")
            else:
                try:
                    started[engine.name, dtype] = engine.start(job, dtype)
                except UserError as error:
                    reasons.append(f"{engine.name} is not measured in {dtype}: {error}")
    return started, reasons


def _absent(packages: Sequence[str]) -> str:
    return f"{' and '.join(packages)} {'is' if len(packages) == 1 else 'are'} not installed; {PIP}"
