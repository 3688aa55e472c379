"""The two registries: attention variants and model-family patchers.

Registering is done by decorator in the one file that defines the method or the family. Everything else that
needs a list of them (CLI choices, documentation tables, the contract suite) reads it from here.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

__all__ = [
    "KINDS",
    "PATCHERS",
    "VARIANTS",
    "Registry",
    "VariantSpec",
    "get_patcher",
    "get_variant",
    "list_patchers",
    "list_variants",
    "register_patcher",
    "register_variant",
]

# kind of method -> what a token reads
KINDS = {
    "local-global": "chosen places, by softmax: a window, and some tokens, blocks or sums that stand for the rest",
    "content-based": "the keys that its query is near to, found by hashing or by weights that are exactly 0",
    "low-rank": "a fixed number of slots, to which all keys are pooled",
    "kernel": "sums over all keys: products of features stand for e^{q . k}",
    "recurrent": "a state that is carried from segment to segment, or forgets as it goes",
    "learned weights": "all tokens, by weights that no comparison makes",
}

T = TypeVar("T")


@dataclass(frozen=True)
class VariantSpec:
    """What the rest of the package may know about an attention variant.

    Attributes:
        key: registry key; also the file name, the config string, the CLI value and the test id.
        title: the method's name in a sentence.
        paper: title and arXiv id of the paper.
        cost: attention cost in the notation of the documentation, e.g. `"n f d"`.
        state: kind of decode state: `"constant"`, `"window"`, `"kv"` or `"none"` (not usable as a decoder).
        module_class: the `AttentionVariant` subclass.
        config_class: its frozen options dataclass.
        encoder: whether it serves bidirectional attention.
        decoder: whether it serves causal attention.
        refusal: why the side it does not serve is refused, with the nearest method that fits.
        exact_limit: `(length, is_causal) -> options` under which the variant equals softmax attention, or `None`.
        uses_global_mask: whether it honors `global_attention_mask`.
        test_options: option sets under which the contract is run besides the defaults; the first one makes short
            inputs exercise the method (a window that does not cover them, say). Lists in them are for
            4 heads and 2 layers; a set that one side refuses with `ValueError` is run on the other only.
        linear_cost: whether it claims never to hold a tensor with two dimensions of sequence length; a function of
            the options where they decide.
        quadratic: what of it takes time quadratic in the length, for the table of methods: options, or "always".
        masked_export: whether a program exported from an encoder computes all pairs of tokens behind a mask, in time
            and memory quadratic in the length, because its blocks have no form for every length.
        any_length: whether an encoder exports with a dynamic length.
        not_exported: options that are refused where the length of an exported program is dynamic, and why.
        kernel: the Triton kernel that can run it on a GPU, e.g. `"linear_attention"`; "" where there is none.
        kernel_sides: the sides whose attention the kernel runs.
        guide: its kind, a key of `KINDS`, and what it is for, in a phrase; None for a variant of your own.

    Raises:
        ValueError: for a kind that `KINDS` does not have.
    """

    key: str
    title: str
    paper: str
    cost: str
    state: Literal["constant", "window", "kv", "none"]
    module_class: type
    config_class: type
    encoder: bool = True
    decoder: bool = True
    refusal: str = ""
    exact_limit: Callable[[int, bool], dict[str, Any]] | None = None
    uses_global_mask: bool = False
    test_options: tuple[dict[str, Any], ...] = ()
    linear_cost: bool | Callable[[Any], bool] = True
    quadratic: str = ""
    masked_export: bool = False
    any_length: bool = True
    not_exported: str = ""
    kernel: Literal["", "linear_attention", "gated_linear_attention", "block_sparse"] = ""
    kernel_sides: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    guide: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.guide is not None and self.guide[0] not in KINDS:
            raise ValueError(f"{self.key}: the kind {self.guide[0]!r} is not known; allowed: {', '.join(KINDS)}.")

    def has_kernel(self, is_causal: bool) -> bool:
        """Whether Triton can run it in a decoder (True) or an encoder (False)."""
        return bool(self.kernel) and ("decoder" if is_causal else "encoder") in self.kernel_sides

    def claims_linear_cost(self, options: dict[str, Any]) -> bool:
        """`linear_cost` under these options."""
        if callable(self.linear_cost):
            return self.linear_cost(self.config_class.from_dict(options))  # type: ignore[attr-defined]
        return self.linear_cost


class Registry(Generic[T]):
    """A name-to-object table, filled by importing every module of one package on first use.

    Readers see all of it or an error, from any number of threads: an import that fails is tried again, and fails
    again, at the next use.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self._package = package
        self._entries: dict[str, T] = {}
        self._lock = threading.RLock()
        self._discovering = False  # only the thread that holds the lock sees it True
        self._discovered = False

    def register(self, key: str, entry: T) -> None:
        """Add `entry` under `key`.

        Raises:
            ValueError: if the key is taken by another object.
        """
        # Without the lock: a thread that imports a method's file itself would wait for the one that discovers, and
        # that one for the import.
        present = self._entries.setdefault(key, entry)
        if present is not entry:
            if not self._is_ours(entry) or _home(present) != _home(entry):
                raise ValueError(f"{self.kind} {key!r} is already registered: {present!r}")
            self._entries[key] = entry  # the module is executed again: it was reloaded, or failed the first time

    def unregister(self, key: str) -> None:
        """Remove `key` (tests and notebooks that redefine a method need it)."""
        self._entries.pop(key, None)

    def get(self, key: str) -> T:
        """Return the entry called `key`.

        Raises:
            ValueError: for an unknown key, with the closest name and the list of all.
        """
        if key not in self:
            close = difflib.get_close_matches(str(key), self.names(), n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"Unknown {self.kind} {key!r}.{hint} Available: {', '.join(self.names())}.")
        return self._entries[key]

    def names(self) -> list[str]:
        """All keys, sorted."""
        self._discover()
        return sorted(self._entries)

    def __contains__(self, key: object) -> bool:
        self._discover()
        return isinstance(key, str) and key in self._entries

    def _discover(self) -> None:
        if self._discovered:
            return
        with self._lock:
            if self._discovered or self._discovering:
                return
            self._discovering = True
            try:
                self._forget_failed_imports()
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self._package}.{module.name}")
                self._discovered = True
            finally:
                self._discovering = False

    def _forget_failed_imports(self) -> None:
        """Drop what a module registered before its import failed: the next import registers it again."""
        for key, entry in list(self._entries.items()):
            if self._is_ours(entry) and _home(entry)[0] not in sys.modules:
                del self._entries[key]

    def _is_ours(self, entry: T) -> bool:
        return _home(entry)[0].startswith(f"{self._package}.")


def _home(entry: Any) -> tuple[str, str]:
    """Module and name of the class that was registered."""
    registered = getattr(entry, "module_class", type(entry))
    return registered.__module__, registered.__qualname__


VARIANTS: Registry[VariantSpec] = Registry("attention variant", "hf_linear_attn.variants")
PATCHERS: Registry[Any] = Registry("model family", "hf_linear_attn.patchers")


def register_variant(key: str, *, config: type, **facts: Any) -> Callable[[type], type]:
    """Class decorator that registers an `AttentionVariant` under `key`; `facts` are the fields of `VariantSpec`."""

    def decorate(module_class: type) -> type:
        spec = VariantSpec(key=key, module_class=module_class, config_class=config, **facts)
        VARIANTS.register(key, spec)
        module_class.spec = spec  # type: ignore[attr-defined]
        return module_class

    return decorate


def get_variant(key: str) -> VariantSpec:
    """The spec of the variant called `key`; `ValueError` with the closest name otherwise."""
    return VARIANTS.get(key)


def list_variants(*, encoder: bool | None = None, decoder: bool | None = None) -> list[str]:
    """Names of the registered variants, optionally only those that serve encoders or decoders.

    Raises:
        ValueError: for something else than True, False and None.
    """
    for side, value in (("encoder", encoder), ("decoder", decoder)):
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{side}={value!r}; allowed: True, False, or None for both.")
    return [
        name
        for name in VARIANTS.names()
        if (encoder is None or VARIANTS.get(name).encoder == encoder)
        and (decoder is None or VARIANTS.get(name).decoder == decoder)
    ]


def register_patcher(model_type: str) -> Callable[[type], type]:
    """Class decorator that registers a family patcher (an instance of it) under Transformers' `model_type`."""

    def decorate(patcher_class: type) -> type:
        PATCHERS.register(model_type, patcher_class(model_type))
        return patcher_class

    return decorate


def get_patcher(model_type: str) -> Any:
    """The patcher of the family `model_type`; `ValueError` with the list of families otherwise."""
    return PATCHERS.get(model_type)


def list_patchers() -> list[str]:
    """Model types of the families that can be converted."""
    return PATCHERS.names()
