"""The config classes of converted models, and their registration with `AutoConfig`.

A converted BERT has a model type of its own, `linear_attn_bert`. Its config is BERT's plus one field, `linear_attn`.
Kept apart from `auto.py` because it must stay light: it runs when the package is imported.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ClassVar, TypeVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from hf_linear_attn.registry import get_patcher, list_patchers
from hf_linear_attn.seam.names import IMPLEMENTATION
from hf_linear_attn.seam.peft import register_peft_targets

__all__ = [
    "IMPLEMENTATION",
    "MODEL_TYPE_PREFIX",
    "check_named_layers",
    "config_class_for",
    "converted_name",
    "file_of",
    "made_once",
    "register_auto_configs",
]

MODEL_TYPE_PREFIX = "linear_attn_"

logger = logging.get_logger(__name__)

T = TypeVar("T")
_MAKING = threading.RLock()


def made_once(make: Callable[[Any], T]) -> Callable[[Any], T]:
    """As `functools.cache`, which lets two threads make two classes; here all wait for the one that is registered."""
    cached = cache(make)

    @wraps(make)
    def locked(argument: Any) -> T:
        with _MAKING:  # one lock for all: these functions call one another
            return cached(argument)

    return locked


def converted_name(name: str) -> str:
    """Class name of the converted form of the upstream class `name`."""
    return f"LinearAttn{name}"


UNCONVERTED_BASE = (
    "The checkpoint is not converted. AutoPeftModel puts an adapter that names it as its base on softmax attention. "
    "Convert again and use PeftModel.from_pretrained(model, adapter), with what the conversion added among "
    "modules_to_save (linear_attn). Or save the converted model, load it, and add the adapter then."
)


class LinearAttnConfigMixin:
    """Behavior shared by every `LinearAttn...Config`; `linear_attn` is `LinearAttentionConfig.to_dict()`."""

    base_model_type: str
    linear_attn: dict[str, Any] | None
    _attn_implementation_internal: str | None
    auto_map: ClassVar[dict[str, str]] = {}
    """The code is in this package. TRL reads the field of a checkpoint whose class stands in no Transformers module."""

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("attn_implementation", "_attn_implementation"):
            _refuse_stored_implementation(name, kwargs.pop(name, None))
        kwargs["attn_implementation"] = IMPLEMENTATION
        # The loader of the repository it came from; `push_to_hub` writes a new one.
        kwargs.pop("auto_map", None)
        self.linear_attn = kwargs.pop("linear_attn", None)
        if self.linear_attn is not None:
            # Validated here so that a bad checkpoint fails before any weight is read, and normalized so that what
            # is saved is what is run.
            self.linear_attn = _checked(self.linear_attn, kwargs.get("name_or_path"))
            # Model classes are registered when such a config is first built: early enough for every Auto class and
            # late enough to keep `import hf_linear_attn` light.
            importlib.import_module("hf_linear_attn.auto").register_auto_models(self.base_model_type)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.linear_attn is not None:
            _check_agreement(self, kwargs.get("name_or_path"))

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        # A config that holds this one, an EncoderDecoderConfig say, hands its own down, and None is nobody's wish.
        if value is not None:
            PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As upstream, except that a config without `linear_attn` is an error.

        An `attn_implementation` among the keywords wins, one in the dictionary is refused. PEFT saves an adapter after
        a look at the config of its base, by this class; of a checkpoint that was not converted it is the family's own.
        """
        if config_dict.get("linear_attn") is None and config_dict.get("model_type") == cls.base_model_type:
            logger.warning_once(UNCONVERTED_BASE)
            return get_patcher(cls.base_model_type).config_class.from_dict(config_dict, **kwargs)
        if config_dict.get("linear_attn") is None:
            source = kwargs.get("name_or_path") or config_dict.get("name_or_path")
            raise ValueError(f"{file_of(source)}linear_attn is missing; it says which layer runs which attention.")
        chosen = kwargs.pop("attn_implementation", None)
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        (result[0] if isinstance(result, tuple) else result)._attn_implementation = chosen
        return result

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing to do: after a load that trusted remote code, Transformers would copy the source of this class
        into every checkpoint that is saved, and that source is in a package."""

    def to_dict(self) -> dict[str, Any]:
        # PEFT takes the model type from here before it looks up target modules, whenever it was imported.
        register_peft_targets(self.model_type, self.base_model_type)  # type: ignore[attr-defined]
        # A process without the plugin must refuse the checkpoint, whatever was switched on while saving.
        return {**super().to_dict(), "attn_implementation": IMPLEMENTATION}  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As upstream.

        Raises:
            ValueError: for a layer with an option of which a file can hold nothing: a function given in Python.
        """
        config_module = importlib.import_module("hf_linear_attn.config")
        config_module.LinearAttentionConfig.from_dict(self.linear_attn).check_savable()
        super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        return {**super().to_diff_dict(), "attn_implementation": IMPLEMENTATION}  # type: ignore[misc]


def check_named_layers(config: Any, exactly: bool = False) -> None:
    """Raise `ValueError` if a converted config names too few layers for its model, or `exactly` as many as it has."""
    named, count = len(config.linear_attn["layers"]), config.num_hidden_layers
    if count < 1:
        raise ValueError(f"{file_of(config.name_or_path)}num_hidden_layers={count}; allowed: an integer of at least 1.")
    if named < count or (exactly and named != count):
        raise ValueError(
            f"{file_of(config.name_or_path)}linear_attn.layers has {named} entries for num_hidden_layers={count}; "
            "allowed: one per layer. from_pretrained(..., num_hidden_layers=...) loads a checkpoint's first layers."
        )


def _refuse_stored_implementation(name: str, value: Any) -> None:
    if value not in (None, IMPLEMENTATION):
        raise ValueError(
            f"The config of a converted model says {name}={value!r}, but its layers were converted. Remove that entry; "
            f"softmax is chosen for a loaded model: from_pretrained(..., attn_implementation={value!r}) or "
            f"model.set_attn_implementation({value!r})."
        )


def file_of(source: Any) -> str:
    """How a sentence about a checkpoint's config begins."""
    return f"{source}/config.json: " if source else ""


def _checked(linear_attn: Any, source: Any) -> dict[str, Any]:
    config_module = importlib.import_module("hf_linear_attn.config")
    try:
        return config_module.LinearAttentionConfig.from_dict(linear_attn).to_dict()
    except ValueError as error:
        raise ValueError(f"{file_of(source)}{error}") from error


def _check_agreement(config: Any, source: Any) -> None:
    """Raise `ValueError` where `linear_attn` cannot be meant for a model of these sizes."""
    positions = config.linear_attn["positions"]
    for name in ("hidden_size", "num_attention_heads", "vocab_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{file_of(source)}{name}={getattr(config, name)}; allowed: an integer of at least 1.")
    check_named_layers(config, exactly=True)
    if positions is None:
        return
    patcher = get_patcher(config.base_model_type)
    limit, length, mode = patcher.max_length(config), positions["original_max_length"], positions["mode"]
    if length > limit:
        raise ValueError(
            f"{file_of(source)}linear_attn.positions.original_max_length={length}; allowed: at most {limit}, which "
            "the model can read."
        )
    if (mode == "rotary") != patcher.rotary:
        kind = "rotary embeddings" if patcher.rotary else "a position table"
        raise ValueError(f"{file_of(source)}linear_attn.positions.mode={mode!r}, but the model has {kind}.")


@made_once
def config_class_for(base_model_type: str) -> type[PreTrainedConfig]:
    """The config class of converted models of the family `base_model_type`."""
    base = get_patcher(base_model_type).config_class
    return type(
        converted_name(base.__name__),
        (LinearAttnConfigMixin, base),
        {
            "__module__": "hf_linear_attn.auto",
            "__doc__": f"`{base.__name__}` with one more field: `linear_attn`, which layer runs which attention.",
            "model_type": MODEL_TYPE_PREFIX + base_model_type,
            "base_model_type": base_model_type,
        },
    )


def register_auto_configs() -> None:
    """Let `AutoConfig` know every family; safe to call twice.

    Importing a family's config can take seconds, so what is registered is a stand-in that makes way for the config
    class, and registers it, the first time a config is asked for.
    """
    for model_type in list_patchers():
        stand_in = _stand_in(model_type)
        AutoConfig.register(stand_in.model_type, stand_in, exist_ok=True)


@made_once
def _stand_in(base_model_type: str) -> type[PreTrainedConfig]:
    def resolve() -> type[PreTrainedConfig]:
        config_class = config_class_for(base_model_type)
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        return config_class

    class StandIn(PreTrainedConfig):
        model_type = MODEL_TYPE_PREFIX + base_model_type

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return resolve()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return resolve().from_dict(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return resolve().from_pretrained(*args, **kwargs)

    # Transformers finds a model type by the name of the class.
    StandIn.__name__ = converted_name(get_patcher(base_model_type).config_name)
    return StandIn
