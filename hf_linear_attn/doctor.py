"""Whether this machine's Transformers is one that converted models can trust: `hf-linear-attn doctor`.

First every fact the package relies on (`seam.facts`), then what they are for, tried on tiny models of every family and
side: each check compares with Transformers' own classes or with the same model without what is checked.
"""

from __future__ import annotations

import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from hf_linear_attn import __version__
from hf_linear_attn.convert import convert_model, revert_model
from hf_linear_attn.registry import VariantSpec, get_patcher, get_variant, list_patchers, list_variants
from hf_linear_attn.seam.cache import LinearAttnCacheLayer, cache_keyword
from hf_linear_attn.seam.facts import FACTS
from hf_linear_attn.seam.family_facts import family_facts
from hf_linear_attn.seam.tiny import PAD, has_causal_lm, tiny_config, tiny_model, token_batch
from hf_linear_attn.seam.versions import NEWEST_TESTED, OLDEST_TESTED

__all__ = ["CHECKS", "Diagnosis", "diagnose", "report", "versions"]

_PACKAGES = (
    "transformers",
    "torch",
    "triton",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "peft",
    "datasets",
    "numpy",
)
_LENGTH = 37


@dataclass
class Diagnosis:
    """What `diagnose` found.

    Attributes:
        facts: fact to what is wrong with it, "" if nothing is.
        families: subject ("bert", "bert decoder") to check to what is wrong, "" if nothing is; a check that does not
            apply is missing.
        warnings: deprecations that Transformers or PyTorch announced meanwhile.
        seconds: how long it took.
    """

    facts: dict[str, str] = field(default_factory=dict)
    families: dict[str, dict[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        """One line for each thing that is wrong."""
        lines = [f"fact {name!r}: {problem}" for name, problem in self.facts.items() if problem]
        for subject, checks in self.families.items():
            lines += [f"{subject}, {name}: {problem}" for name, problem in checks.items() if problem]
        return lines


def versions() -> dict[str, str]:
    """Name to version of all that matters to a bug report."""
    found = {
        "hf-linear-attn": f"{__version__} (tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED})",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return found


def diagnose(families: list[str] | None = None, say: Callable[[str], None] = lambda _line: None) -> Diagnosis:
    """Run every probe, and every check on every family and side.

    Args:
        families: model types; all by default.
        say: told what is being tried.

    Raises:
        ValueError: for an unknown family.
    """
    chosen = [get_patcher(name).model_type for name in families] if families else list_patchers()
    result, start = Diagnosis(), time.monotonic()
    with _quiet(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for fact in FACTS:
            say(fact.name)
            result.facts[fact.name] = _problem(fact.probe)
        for family in chosen:
            causal = get_patcher(family).is_causal(tiny_config(family))
            for decoder in [causal] if causal or not has_causal_lm(family) else [False, True]:
                subject = family if decoder == causal else f"{family} decoder"
                say(subject)
                result.families[subject] = {
                    name: _problem(partial(check, family, decoder))
                    for name, (sides, check) in CHECKS.items()
                    if decoder in sides
                }
        deprecations = [w for w in caught if issubclass(w.category, (FutureWarning, DeprecationWarning))]
        result.warnings = sorted({f"{w.category.__name__}: {w.message}" for w in deprecations})
    result.seconds = time.monotonic() - start
    return result


def _problem(probe: Callable[[], None]) -> str:
    """What a probe raises, in a line; "" for nothing. Whatever it is: the next version of Transformers chooses."""
    try:
        probe()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers' progress bars and remarks off meanwhile."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------------------------------------------------------
# Checks: (family, decoder) -> None, raising what is wrong
# ---------------------------------------------------------------------------------------------------------------


def _exact(decoder: bool) -> tuple[str, dict[str, Any]]:
    """A method and options under which it equals softmax on these lengths."""
    spec = next(s for s in _serving(decoder) if s.exact_limit is not None and s.linear_cost is True)
    assert spec.exact_limit is not None
    return spec.key, spec.exact_limit(_LENGTH, decoder)


def _recurrent(decoder: bool) -> str:
    """A method whose decode state has a constant size."""
    return next(spec.key for spec in _serving(decoder) if spec.state == "constant")


def _serving(decoder: bool) -> list[VariantSpec]:
    side = {"decoder": True} if decoder else {"encoder": True}
    return [get_variant(name) for name in list_variants(**side)]


@torch.no_grad()
def _outputs(model: Any, batch: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """The first output of a model, `[B, T, ...]`."""
    return model(**batch, **kwargs)[0]


def _close(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4, msg=lambda text: f"{what}: {text}")


def check_convert(family: str, decoder: bool) -> None:
    """Converted to a method at its exact limit, the model gives what softmax gave, and reverted the very bits."""
    family_facts(family)
    model, batch = tiny_model(family, decoder=decoder), token_batch()
    softmax = _outputs(model, batch)
    key, options = _exact(decoder)
    convert_model(model, key, **options)
    _close(_outputs(model, batch), softmax, f"{key} at its exact limit is not softmax")
    if not torch.equal(_outputs(revert_model(model), batch), softmax):
        raise AssertionError("the reverted model gives other bits than the checkpoint")


def check_padding(family: str, decoder: bool) -> None:
    """Padding, on the left of decoders and the right of encoders, changes nothing for the tokens beside it."""
    model = convert_model(tiny_model(family, decoder=decoder), _recurrent(decoder))
    batch, real = token_batch(), slice(17, None) if decoder else slice(0, 20)
    alone = _outputs(model, {name: tensor[:1, real] for name, tensor in batch.items()})
    pads = torch.ones(_LENGTH, dtype=torch.bool)
    pads[real] = False
    batch["input_ids"][0, pads] = PAD
    batch["attention_mask"][0, pads] = 0
    if decoder:
        offset = get_patcher(family).position_offset(tiny_config(family))
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) + offset
    _close(_outputs(model, batch)[:1, real], alone, "padding changes the tokens beside it")


def check_hidden_states(family: str, decoder: bool) -> None:
    """`output_hidden_states` gives the embeddings and every layer's output."""
    model, batch = tiny_model(family, decoder=decoder), token_batch()
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True).hidden_states
        key, options = _exact(decoder)
        found = convert_model(model, key, **options)(**batch, output_hidden_states=True).hidden_states
    if found is None or len(found) != len(expected):
        raise AssertionError(f"{0 if found is None else len(found)} hidden states, expected {len(expected)}")
    for a, b in zip(found, expected, strict=True):
        _close(a, b, "hidden states differ from upstream's")


def check_cache(family: str, decoder: bool) -> None:
    """With a cache, piece by piece, a model gives what it gives at once, and keeps as much after more tokens."""
    model: Any = convert_model(tiny_model(family, decoder=decoder), _recurrent(decoder))
    ids, name = token_batch()["input_ids"], cache_keyword(type(model).forward)
    cache, pieces, sizes = DynamicCache(), [], []
    for piece in ids.split([20, 1, 1, 15], dim=1):
        pieces.append(_outputs(model, {"input_ids": piece}, **{name: cache}))
        foreign = [type(layer).__name__ for layer in cache.layers if not isinstance(layer, LinearAttnCacheLayer)]
        if foreign:
            raise AssertionError(f"the cache's layers are {foreign}")
        sizes.append(sum(x.numel() for layer in cache.layers for x in layer.state.values()))  # type: ignore[union-attr]
    _close(torch.cat(pieces, 1), _outputs(model, {"input_ids": ids}, use_cache=False), "a cache changes the outputs")
    if len(set(sizes)) != 1:
        raise AssertionError(f"the decode state grows: {sizes} numbers")


def check_generate(family: str, decoder: bool) -> None:
    """Left-padded generation gives the same tokens with a cache as without."""
    model: Any = convert_model(tiny_model(family, decoder=decoder), _recurrent(decoder))
    batch = token_batch(length=12)
    batch["input_ids"][1, :5] = PAD
    batch["attention_mask"][1, :5] = 0
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    cached, plain = (model.generate(**batch, **kwargs, use_cache=use_cache) for use_cache in (True, False))
    if not torch.equal(cached, plain):
        raise AssertionError(f"with a cache {cached[:, 12:].tolist()}, without {plain[:, 12:].tolist()}")


def check_reload(family: str, decoder: bool) -> None:
    """Saved and loaded by an Auto class, a model is converted and gives the same bits."""
    model = convert_model(tiny_model(family, decoder=decoder), _recurrent(decoder))
    auto_class = modeling_auto.AutoModelForCausalLM if decoder else modeling_auto.AutoModel
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again: Any = auto_class.from_pretrained(folder)
    if type(again) is not type(model):
        raise AssertionError(f"a {type(again).__name__} was loaded, expected {type(model).__name__}")
    batch = token_batch()
    if not torch.equal(_outputs(again, batch), _outputs(model, batch)):
        raise AssertionError("the loaded model gives other bits than the saved one")


def check_export(family: str, decoder: bool) -> None:
    """`torch.export` gives a program that computes the same."""
    model = convert_model(tiny_model(family, decoder=decoder), _recurrent(decoder))
    batch: dict[str, Any] = token_batch()
    kwargs = {**batch, **({"use_cache": False} if decoder else {}), "return_dict": False}
    program = torch.export.export(model, (), kwargs, strict=False)
    _close(program.module()(**kwargs)[0], _outputs(model, kwargs), "the exported program differs")


CHECKS: dict[str, tuple[tuple[bool, ...], Callable[[str, bool], None]]] = {
    "convert": ((False, True), check_convert),
    "padding": ((False, True), check_padding),
    "hidden states": ((False, True), check_hidden_states),
    "reload": ((False, True), check_reload),
    "export": ((False, True), check_export),
    "cache": ((True,), check_cache),
    "generate": ((True,), check_generate),
}
"""Name of a check to the sides it applies to (False: encoders, True: decoders) and the check."""


def report(result: Diagnosis) -> str:
    """Versions, a line for each fact and a table of families, as Markdown to paste into a bug report."""
    lines = [f"- {name}: {version}" for name, version in versions().items()]
    lines += ["", "| fact | |", "| --- | --- |"]
    lines += [f"| {name} | {'FAILED' if problem else 'ok'} |" for name, problem in result.facts.items()]
    lines += ["", f"| model | {' | '.join(CHECKS)} |", f"| --- |{' --- |' * len(CHECKS)}"]
    for subject, checks in result.families.items():
        cells = [("FAILED" if checks[name] else "ok") if name in checks else "-" for name in CHECKS]
        lines.append(f"| {subject} | {' | '.join(cells)} |")
    if result.warnings:
        lines += ["", "Deprecations announced meanwhile:", *(f"- {text}" for text in result.warnings)]
    if result.failures:
        lines += ["", "Failed:", *(f"- {line}" for line in result.failures)]
    total = len(result.facts) + sum(map(len, result.families.values()))
    lines += ["", f"{total - len(result.failures)} passed, {len(result.failures)} failed in {result.seconds:.0f} s."]
    return "\n".join(lines)
