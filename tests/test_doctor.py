"""The seam with Transformers, broken on purpose: every fact has a way to break it, and the probe that names it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AttentionMaskInterface, AutoConfig, DynamicCache, GPT2LMHeadModel, GPT2Model, PreTrainedConfig
from transformers import cache_utils as caches
from transformers.models.auto import auto_factory, tokenization_auto
from transformers.models.gpt2 import modeling_gpt2
from transformers.utils import output_capturing
from typer.testing import CliRunner

from hf_linear_attn import auto, convert_model, doctor, list_patchers
from hf_linear_attn.auto_config import IMPLEMENTATION
from hf_linear_attn.cli import app
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam import versions
from hf_linear_attn.seam.cache import LinearAttnCacheLayer, cache_keyword, find_cache
from hf_linear_attn.seam.checkpointing import enable_checkpointing
from hf_linear_attn.seam.facts import FACTS
from hf_linear_attn.seam.family_facts import family_facts
from tests.tiny import causal_lm, token_batch

ROOT = Path(__file__).parents[1]
Break = Callable[[pytest.MonkeyPatch], None]
PROBES = {fact.name: fact.probe for fact in FACTS}


def _lost_on_the_way(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return _ATTENTION(self, args[0], **{k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")})


def _renamed(self: nn.Module, hidden_states: torch.Tensor, kv_store: Any = None, **kwargs: Any) -> Any:
    return _ATTENTION(self, hidden_states, **kwargs)


def _other_keywords(function: Callable[..., Any]) -> Callable[..., Any]:
    """A registry's lookup that hands out functions called with other names."""
    names = {"scaling": "scale", "kv_length": "key_length"}

    def lookup(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        return lambda *a, **k: found(*a, **{names.get(name, name): value for name, value in k.items()})

    return lookup


_ATTENTION = modeling_gpt2.GPT2Attention.forward
_LOAD = GPT2LMHeadModel.from_pretrained.__func__


def _without_info(cls: type, *args: Any, **kwargs: Any) -> Any:
    model, info = _LOAD(cls, *args, **kwargs)
    return model, {**info, "missing_keys": set()}


def _without_fields(self: PreTrainedConfig, **kwargs: Any) -> None:
    kwargs.pop("attn_implementation", None)
    _POST_INIT(self, **kwargs)


_POST_INIT = PreTrainedConfig.__post_init__


BREAKS: dict[str, Break] = {
    "cache layers": lambda m: m.setattr(caches, "DynamicLayer", type("NewLayer", (caches.DynamicLayer,), {})),
    "cache methods": lambda m: m.setattr(caches.Cache, "reorder_cache", lambda self, beam_idx: None),
    "cache of a composite": lambda m: m.setattr(
        caches.EncoderDecoderCache, "self_attention_cache", property(lambda s: None, lambda s, v: None), raising=False
    ),
    "cache keyword": lambda m: m.setattr(modeling_gpt2.GPT2Attention, "forward", _renamed),
    "cache reaches layers": lambda m: m.setattr(
        modeling_gpt2.GPT2Block, "__call__", lambda s, x, *a, **k: _block(s, x, **k), raising=False
    ),
    "attention interface": lambda m: m.setattr(
        type(modeling_gpt2.ALL_ATTENTION_FUNCTIONS),
        "get_interface",
        _other_keywords(type(modeling_gpt2.ALL_ATTENTION_FUNCTIONS).get_interface),
    ),
    "mask interface": lambda m: m.setattr(
        type(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS),
        "__getitem__",
        _other_keywords(type(transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS).__getitem__),
    ),
    "packing rule": lambda m: m.setattr(
        transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None
    ),
    "config fields": lambda m: m.setattr(PreTrainedConfig, "__post_init__", _without_fields),
    "config registry": lambda m: m.setattr(
        AutoConfig, "for_model", classmethod(lambda cls, model_type, **kwargs: PreTrainedConfig())
    ),
    "model registries": lambda m: m.delattr(auto_factory._LazyAutoMapping, "register"),
    "tokenizer registry": lambda m: m.setattr(
        type(tokenization_auto.TOKENIZER_MAPPING), "__getitem__", lambda self, key: "BertTokenizer"
    ),
    "output recorders": lambda m: m.setattr(output_capturing, "_CAN_RECORD_REGISTRY", {}),
    "tied weights": lambda m: m.setattr(
        GPT2LMHeadModel, "get_expanded_tied_weights_keys", lambda self, all_submodels=False: ["lm_head.weight"]
    ),
    "loading": lambda m: m.setattr(GPT2LMHeadModel, "from_pretrained", classmethod(_without_info)),
    "generation guards": lambda m: m.setattr(
        GPT2LMHeadModel, "generate", lambda self, *args, **kwargs: self.forward(*args), raising=False
    ),
    "initialization marks": lambda m: m.setattr(
        GPT2LMHeadModel, "init_weights", lambda self: [x.data.zero_() for x in self.parameters()]
    ),
    "configs in configs": lambda m: m.setattr(PreTrainedConfig, "_attn_implementation", "eager"),
    "weights before they are read": lambda m: m.setattr(
        GPT2LMHeadModel, "from_pretrained", classmethod(lambda cls, folder: None)
    ),
    "model attributes": lambda m: m.setattr(GPT2LMHeadModel, "set_attn_implementation", lambda self, name: None),
    "trainer hooks": lambda m: m.delattr(transformers.Trainer, "_init_training_state"),
}


def _block(block: nn.Module, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return nn.Module.__call__(block, hidden_states, None, **kwargs)


@pytest.mark.parametrize("fact", FACTS, ids=[fact.name for fact in FACTS])
def test_every_fact_holds_and_its_probe_notices_when_it_does_not(fact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fact.probe()
    with monkeypatch.context() as patch:
        BREAKS[fact.name](patch)
        with pytest.raises(Exception, match=r"\w"):
            fact.probe()
    fact.probe()


def test_every_fact_is_a_sentence_with_a_name_of_its_own() -> None:
    assert set(PROBES) == set(BREAKS)
    assert len(PROBES) == len(FACTS)
    assert all(fact.claim.endswith(".") and len(fact.claim) > 40 for fact in FACTS)


FAMILY_BREAKS: dict[str, tuple[str, Any]] = {
    "attention class": ("is_self_attention", lambda module: False),
    "projections": ("projections", None),
    "position table": ("position_offset", lambda config: 7),
    "causality": ("is_causal", lambda config: None),
    "stack of layers": ("stack", lambda model: model.get_input_embeddings()),
}


@pytest.mark.parametrize("broken", FAMILY_BREAKS)
@pytest.mark.parametrize("family", list_patchers())
def test_a_patcher_that_is_wrong_about_its_family_is_noticed(
    family: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family_facts(family)
    patcher, (name, value) = get_patcher(family), FAMILY_BREAKS[broken]
    if broken == "position table" and patcher.rotary:
        value, name = False, "rotary"
    if broken == "causality":
        right = bool(patcher.is_causal(causal_lm("gpt2").config)) if family == "gpt2" else patcher.rotary
        value = lambda config: not right  # noqa: E731
    if broken == "projections":
        projections = patcher.projections
        value = lambda module: projections(module)[1:] + projections(module)[:1]  # noqa: E731
    monkeypatch.setattr(patcher, name, value, raising=False)
    with pytest.raises((AssertionError, AttributeError)):
        family_facts(family)


@contextmanager
def calls_lose_the_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a renamed keyword did: the model has a cache, its attention modules are called without."""
    with monkeypatch.context() as patch:
        patch.setattr(modeling_gpt2.GPT2Attention, "forward", _lost_on_the_way)
        patch.setattr(modeling_gpt2.GPT2Block, "forward", _block_without_cache)
        yield


def _block_without_cache(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    names = ("cache", "past_key_values")
    return _BLOCK(self, hidden_states, None, *args[1:], **{k: v for k, v in kwargs.items() if k not in names})


_BLOCK = modeling_gpt2.GPT2Block.forward


def test_a_cache_that_does_not_reach_a_converted_layer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_model(causal_lm("gpt2"), "linear")
    ids = token_batch()["input_ids"]
    with calls_lose_the_cache(monkeypatch):
        for kwargs in ({"use_cache": True}, {}, {cache_keyword(type(model).forward): DynamicCache()}):
            with pytest.raises(
                RuntimeError, match=rf"layer 0 was not given it.*transformers {transformers.__version__}"
            ):
                model(ids, **kwargs)
        with pytest.raises(RuntimeError, match="was not given it"):
            model.generate(ids, max_new_tokens=2)
        model(ids, use_cache=False)  # nothing to lose
    model(ids, use_cache=True)


def test_a_cache_under_a_name_nobody_knows_still_reaches_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DynamicCache()
    assert find_cache([("hidden_states", torch.zeros(1)), ("kv_store", cache)]) is cache
    with pytest.raises(ValueError, match="past_key_values is a tuple"):
        find_cache([("past_key_values", ((torch.zeros(1),),))])
    assert find_cache([("cache", cache), ("past_key_values", cache)]) is cache
    with pytest.raises(ValueError, match="cache with 0 tokens and past_key_values with 0"):
        find_cache([("cache", cache), ("past_key_values", DynamicCache())])


def test_training_with_recomputed_activations_may_ask_for_a_cache() -> None:
    model = convert_model(causal_lm("gpt2"), "linear").train()
    enable_checkpointing(model)
    model(**token_batch(), use_cache=True)[0].sum().backward()


class TestSoftmaxMeetsAState:
    """A cache that a converted model filled is never used by softmax attention, which would see the new tokens only."""

    @pytest.fixture
    def filled(self) -> tuple[Any, torch.Tensor, DynamicCache, str]:
        model: Any = convert_model(causal_lm("gpt2"), "linear")
        ids, cache, name = token_batch()["input_ids"], DynamicCache(), cache_keyword(type(model).forward)
        with torch.no_grad():
            model(ids, **{name: cache})
        return model, ids, cache, name

    def test_after_a_switch(self, filled: tuple[Any, torch.Tensor, DynamicCache, str]) -> None:
        model, ids, cache, name = filled
        model.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match=r"state of a converted layer after 37 tokens.*new cache"):
            model(ids[:, :1], **{name: cache})
        model.set_attn_implementation("linear_attn")
        with torch.no_grad():  # nothing was changed by the refused call
            model(ids[:, :1], **{name: cache})
        assert cache.get_seq_length() == 38

    def test_in_an_unconverted_model(self, filled: tuple[Any, torch.Tensor, DynamicCache, str]) -> None:
        _, ids, cache, name = filled
        with pytest.raises(ValueError, match="state of a converted layer"):
            causal_lm("gpt2")(ids[:, :1], **{name: cache})

    def test_in_a_hybrid(self, filled: tuple[Any, torch.Tensor, DynamicCache, str]) -> None:
        _, ids, cache, name = filled
        for layer in (0, 1):
            with pytest.raises(ValueError, match=r"state of a converted layer|inconsistent"):
                convert_model(causal_lm("gpt2"), {layer: "linear"})(ids[:, :1], **{name: cache})

    def test_an_empty_one_is_an_ordinary_layer_again(self, filled: tuple[Any, torch.Tensor, DynamicCache, str]) -> None:
        model, ids, cache, name = filled
        cache.reset()
        model.set_attn_implementation("sdpa")
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
            pieces = [model(piece, **{name: cache}).logits for piece in ids.split([20, 1, 16], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)
        assert [type(layer) for layer in cache.layers] == [caches.DynamicLayer] * 2


def test_a_reused_cache_of_another_batch_size_is_a_sentence() -> None:
    model: Any = convert_model(causal_lm("gpt2"), "linear")
    ids, cache, name = token_batch()["input_ids"], DynamicCache(), cache_keyword(type(model).forward)
    with torch.no_grad():
        model(ids, **{name: cache})
        with pytest.raises(ValueError, match="states of 2 sequences, the batch has 1"):
            model(ids[:1], **{name: cache})


def test_the_command_reports_and_fails_with_the_name_of_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["doctor", "--family", "bert", "--family", "gpt2"])
    assert done.exit_code == 0, done.output
    for expected in (f"transformers: {transformers.__version__}", "| cache keyword | ok |", "| bert decoder | ok |"):
        assert expected in done.output
    assert " 0 failed" in done.output
    with calls_lose_the_cache(monkeypatch):
        done = CliRunner().invoke(app, ["doctor", "--family", "gpt2"])
    assert done.exit_code == 1
    assert "- gpt2, cache: RuntimeError: The model ran with a cache, but converted layer 0" in done.output
    assert "| cache reaches layers | FAILED |" in done.output


def _noisy(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    return _ATTENTION(self, hidden_states + torch.rand(1), *args, **kwargs)


def _no_mask(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(AttentionMaskInterface._global_mapping, IMPLEMENTATION, lambda **_: None)
    patch.setattr(auto, "with_sequence_plan", lambda model, args, kwargs: kwargs)


def _changed_on_load(cls: type, *args: Any, **kwargs: Any) -> Any:
    model, info = _LOAD(cls, *args, **kwargs)
    model.transformer.ln_f.bias.data += 1
    return model, info


CHECK_BREAKS: dict[str, Break] = {
    "convert": lambda m: m.setattr(modeling_gpt2.GPT2Attention, "forward", _noisy),
    "padding": _no_mask,
    "hidden states": lambda m: m.setattr(GPT2Model, "_can_record_outputs", {}),
    "reload": lambda m: m.setattr(GPT2LMHeadModel, "from_pretrained", classmethod(_changed_on_load)),
    "export": lambda m: m.setattr(torch.export, "export", lambda *args, **kwargs: None),
    "cache": lambda m: m.setattr(LinearAttnCacheLayer, "get_seq_length", lambda self: 0),
    "generate": lambda m: m.setattr(LinearAttnCacheLayer, "get_seq_length", lambda self: 0),
}


@pytest.mark.parametrize("check", doctor.CHECKS)
def test_every_check_notices_what_it_is_for(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, run = doctor.CHECKS[check]
    run("gpt2", True)
    CHECK_BREAKS[check](monkeypatch)
    with pytest.raises(Exception, match=r"\w"):
        run("gpt2", True)


def test_what_happens_when_a_family_is_unknown() -> None:
    with pytest.raises(ValueError, match="Available"):
        doctor.diagnose(["berd"])


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_a_newer_transformers_is_announced_with_the_command() -> None:
    versions.logger.warning_once.cache_clear()
    versions.logger.addHandler(collector := _Collector())
    try:
        versions.say_if_untested(versions.NEWEST_TESTED)
        assert collector.said == []
        for _ in range(2):
            versions.say_if_untested("99.0.0")
    finally:
        versions.logger.removeHandler(collector)
    assert len(collector.said) == 1
    assert "99.0.0" in collector.said[0]
    assert "hf-linear-attn doctor" in collector.said[0]


def test_the_versions_that_were_tested_are_those_of_the_constraints() -> None:
    def pinned(path: Path) -> list[str]:
        lines = path.read_text().splitlines()
        return [line.split("==")[1].split(";")[0].strip() for line in lines if line.startswith("transformers==")]

    assert max(pinned(ROOT / "constraints.txt"), key=Version) == versions.NEWEST_TESTED
    assert pinned(ROOT / ".ci" / "oldest.txt") == [versions.OLDEST_TESTED]
    lowest = f'"transformers>={versions.OLDEST_TESTED.removesuffix(".0")}"'
    assert lowest in (ROOT / "pyproject.toml").read_text()
