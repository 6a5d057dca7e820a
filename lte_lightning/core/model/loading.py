"""Load a saved model as a sparse model."""

import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from lte_lightning.core.model.backend import set_backend
from lte_lightning.core.model.checks import (
    require_complete,
    require_finite,
    require_floating,
    require_sizes,
    require_sound_routers,
)
from lte_lightning.core.model.config import LteConfig
from lte_lightning.core.model.convert import convert
from lte_lightning.core.model.experts import expert_ffns, set_mode
from lte_lightning.core.model.folder import (
    CONFIG_FILE,
    HUB_OPTIONS,
    QUANTIZED_VERSION,
    ROUTERS_FILE,
    LayoutError,
    find,
    find_model,
    is_lte,
    read_description,
    read_lte_config,
    read_routers,
    require_file,
    said_of,
    stored_weights,
    weight_files,
)
from lte_lightning.core.model.quantize import (
    Quantization,
    load_quantized,
    quantization,
    require_kind,
    require_quantization,
)
from lte_lightning.core.model.quantize import quantize as quantize_model
from lte_lightning.core.model.routers import load_routers
from lte_lightning.core.model.saved_together import CHOOSE_FILE, require_loaded, require_own
from lte_lightning.core.model.thresholds import keep_table, read_table, set_sparsity, tensors_of
from lte_lightning.errors import UserError
from lte_lightning.files import abridged
from lte_lightning.kernels.dispatch import BACKENDS, Backend

# Whether `from_pretrained` is loading the plain model through an Auto class.
_LOADS_PLAIN: ContextVar[bool] = ContextVar("loads_plain", default=False)
# The methods that `register` has replaced.
_TRANSFORMERS_OWN: dict[Any, Any] = {}


def from_pretrained(
    source: str | os.PathLike[str],
    auto_class: Any = None,
    backend: Backend = "auto",
    *,
    quantize: Quantization | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a model that `save_pretrained` wrote, with experts and routers, in the mode in which it was saved.

    The routers take the type of the weights that they decide on.

    Args:
        source: A folder, a run's folder, or a hub id.
        auto_class: The class that builds the plain model, e.g. ``AutoModelForCausalLM``; by default the saved one.
        backend: The backend of the selected experts in hard mode without gradients; see `set_backend`.
        quantize: ``int8`` or ``int4``: round the weights as `quantize` does. A folder that was saved quantised does not
            need it.
        **kwargs: Passed to the plain model's ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...). A
            folder that was saved quantised takes only ``dtype`` and the options that say where it lies.

    Raises:
        UserError: If there is no such backend or quantisation, or weights are missing, nonfinite, or unknown to the
            model.
        LayoutError: If there is no such folder, or the source is not an LTE model, has another format, or has routers
            that were not saved with its weights.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    if quantize is not None:
        require_quantization(quantize)
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    if not hub.get("subfolder"):
        source = find_model(source)
    wants_info = kwargs.pop("output_loading_info", False)
    config = read_lte_config(source, **hub)
    description = read_description(source, **hub)
    with said_of(source):
        hf_config = AutoConfig.from_pretrained(source, **hub)
        require_sizes(hf_config)
    if auto_class is None:
        architecture = (hf_config.architectures or ["none"])[0]
        auto_class = getattr(transformers, str(architecture), None)
        if not (isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel)):
            raise LayoutError(f"{source} was saved as {architecture!r}, which transformers lacks; pass auto_class")
    variant = kwargs.get("variant")
    weight_files(source, variant, **hub)  # before transformers reads a file of another folder
    routers = read_routers(source, **hub)
    table = read_table(source, description, **hub)
    model: PreTrainedModel
    is_quantized = description["layout_version"] == QUANTIZED_VERSION
    if is_quantized:
        require_kind(description, quantize, source)
        model, info = _read_quantized(source, auto_class, hf_config, config, description, kwargs), {}
    else:
        token = _LOADS_PLAIN.set(True)
        try:
            with said_of(source):
                model, info = auto_class.from_pretrained(source, output_loading_info=True, **kwargs)
        finally:
            _LOADS_PLAIN.reset(token)
        require_complete(model, info, source, own=True)
        # Each check maps the files anew, because pages of the model's own mapping would stay in memory once read.
        with said_of(source):
            stored = stored_weights(source, variant, **hub)
            require_floating(stored, source)
            require_finite(stored, source)
            if CHOOSE_FILE & kwargs.keys() or find(source, "adapter_config.json", **hub):
                require_loaded(model, stored, source)  # not always: it reads weights of which this mapping has copies
            del stored
        if "dtype" in kwargs or "torch_dtype" in kwargs:  # the conversion to another type may overflow
            require_finite(dict(model.named_parameters()), source)
        convert(model, config, group=False)
    path = require_file(source, ROUTERS_FILE, **hub)
    load_routers(model, routers, path)
    require_sound_routers(routers, path)
    require_own(
        description, stored_weights(source, variant, **hub), routers, hf_config, source, model.base_model_prefix
    )
    for ffn in expert_ffns(model).values():
        for parameter in ffn.selector.parameters():  # not buffers, because a calibrated level must not be rounded
            parameter.data = parameter.data.to(model.config.dtype if is_quantized else ffn.up.weight.dtype)
    model.__dict__["lte_base"] = description.get("base")  # its card will name it when it is saved again
    set_mode(model, description["mode"])
    keep_table(model, table, tensors_of(description))
    if table is not None and table.chosen is not None:
        set_sparsity(model, table.chosen)
    set_backend(model, backend)
    if quantize and not is_quantized:
        quantize_model(model.eval(), quantize)
    return (model, info) if wants_info else model  # type: ignore[return-value]


def _read_quantized(
    source: Any, auto_class: Any, hf_config: Any, config: LteConfig, description: dict[str, Any], kwargs: dict[str, Any]
) -> PreTrainedModel:
    """Builds a model from its configuration, and loads the folder's quantised weights into it."""
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    own = {"dtype", "torch_dtype", "attn_implementation", *hub}
    unknown = []
    for key in sorted(set(kwargs) - own):  # settings of the configuration, which transformers takes, too
        if hasattr(hf_config, key):
            setattr(hf_config, key, kwargs[key])
        else:
            unknown.append(key)
    if unknown:
        raise UserError(
            f"{source} is quantised, and is loaded with dtype, attn_implementation, settings of its configuration and "
            f"where it lies alone: leave out {', '.join(unknown)}"
        )
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
    options = {"dtype": (hf_config.dtype or torch.float32) if dtype in ("auto", None) else dtype}
    if "attn_implementation" in kwargs:
        options["attn_implementation"] = kwargs["attn_implementation"]
    hf_config.__dict__.pop("quantization_config", None)
    with no_init_weights():  # memory that nothing writes to costs nothing
        build = auto_class.from_config if hasattr(auto_class, "from_config") else auto_class._from_config
        model: PreTrainedModel = build(hf_config, **options)
    model.tie_weights()
    convert(model.eval(), config, group=False)
    stored = stored_weights(source, **hub)
    require_finite(stored, source)  # scales are no parameters
    try:
        load_quantized(model, stored, description["quantized"]["tied_embedding"])
        if (kind := description["quantized"]["kind"]) != quantization(model):
            raise ValueError(f"they are {quantization(model)}, and {CONFIG_FILE} says {abridged(kind)}")
    except (KeyError, TypeError, ValueError) as error:
        raise LayoutError(f"the quantised weights of {source} are damaged: {error}") from error
    require_finite(dict(model.named_parameters()), source)
    return model


def register(active: bool = True) -> None:
    """Lets transformers' Auto classes, and with them ``pipeline``, load saved LTE models sparse.

    ``AutoModelForCausalLM.from_pretrained(FOLDER)`` is then ``lte_lightning.from_pretrained(FOLDER,
    AutoModelForCausalLM)`` if the folder, or the repository on the hub, holds an ``lte_config.json``. All others load
    as before. Without this call, the Auto classes load the dense function of an LTE model.

    Args:
        active: False undoes an earlier call.
    """
    if not active:
        while _TRANSFORMERS_OWN:
            auto_class, own = _TRANSFORMERS_OWN.popitem()
            auto_class.from_pretrained = own
        return
    for auto_class in _with_subclasses(_BaseAutoModelClass):  # each has a copy of the method, for its own docstring
        if "from_pretrained" in vars(auto_class) and auto_class not in _TRANSFORMERS_OWN:
            _TRANSFORMERS_OWN[auto_class] = own = vars(auto_class)["from_pretrained"]
            auto_class.from_pretrained = classmethod(partial(_load_either, own.__func__))


def _with_subclasses(base: Any) -> Iterator[Any]:
    yield base
    for each in base.__subclasses__():
        yield from _with_subclasses(each)


def _load_either(own: Any, auto_class: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    if _LOADS_PLAIN.get() or not is_lte(source, **hub):
        return own(auto_class, source, *args, **kwargs)
    if args:
        raise TypeError(f"{source} is an LTE model, which takes options by name: not {args}")
    return from_pretrained(source, auto_class, **kwargs)
