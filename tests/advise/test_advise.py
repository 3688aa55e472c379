"""`advise`: what it concludes from known times, and that it measures every family."""

from __future__ import annotations

import copy
import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import BertModel, PreTrainedTokenizerFast

from hf_linear_attn import convert_model, list_patchers, list_variants
from hf_linear_attn.advise import layers as advise_layers
from hf_linear_attn.advise import run as advise_module
from hf_linear_attn.advise.quality import start_errors
from hf_linear_attn.advise.run import (
    SDPA,
    Crossover,
    advise,
    crossover_length,
    default_lengths,
    format_advice,
)
from hf_linear_attn.calibration import record
from hf_linear_attn.measure.methods import Method
from hf_linear_attn.measure.profile import PeakMemory
from hf_linear_attn.registry import get_patcher, get_variant
from tests.tiny import build, tiny_config, token_batch

QUICK = {"budget_seconds": 1e-3, "repeats": 1}


class Clock:
    """Time that passes only where a model says so."""

    def __init__(self) -> None:
        self.now = 0.0


class Timed(nn.Module):
    """A model whose forward takes a known time; it runs out of memory past `limit` tokens."""

    def __init__(self, clock: Clock, seconds, limit: int = 10**9) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.clock, self.seconds, self.limit = clock, seconds, limit
        self.calls = 0

    def forward(self, inputs_embeds):
        length = inputs_embeds.shape[1]
        if length > self.limit:
            raise torch.OutOfMemoryError("no")
        self.calls += 1
        self.clock.now += self.seconds(length)
        return SimpleNamespace(last_hidden_state=inputs_embeds * self.weight)


def known_memory(monkeypatch):
    """Each piece of work is done once more for its memory, which is said to be 7 MB."""

    def peak_memory(fn, device):
        fn()
        return PeakMemory(7_000_000, "said")

    monkeypatch.setattr(advise_module, "peak_memory", peak_memory)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    known_memory(monkeypatch)
    return clock


@pytest.fixture
def known_times(monkeypatch, clock):
    """SDPA takes n^2 / 2^20 s, the linear ones n / 2^12 and n / 2^13 s; a step costs what a forward does."""
    models = {
        SDPA: Timed(clock, lambda n: n * n / 2**20),
        "linear": Timed(clock, lambda n: n * 384 / 2**20),
        "performer": Timed(clock, lambda n: n * 64 / 2**20),
        "efficient": Timed(clock, lambda n: n * n / 2**19),
        "taylor": Timed(clock, lambda n: 0.0, limit=128),
    }
    refused = {"longformer": "no such shape"}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, dict(refused)))
    return advise(tiny_config("bert"), 512, variants=[*list(models)[1:], "longformer"], repeats=3)


def test_ranking_crossovers_and_failures_from_known_times(known_times):
    advice = known_times
    assert advice.lengths == (256, 512)
    for work in ("forward", "step"):
        assert [row.name for row in advice.ranking(work)] == ["performer", "linear", SDPA, "efficient"]
        crossovers = advice.crossovers(work)
        assert list(crossovers.items()) == [
            ("performer", Crossover(256, at_most=True)),
            ("linear", Crossover(384)),
            ("efficient", Crossover(None)),
        ]
        assert advice.smallest_crossover(work) == ("performer", Crossover(256, at_most=True))
        assert advice.row("performer", 512).ratio[work] == pytest.approx(8)
        assert advice.row(SDPA, 512).seconds[work] == pytest.approx(0.25)
    assert advice.left_out == {
        "longformer": "no such shape", "taylor at 256": "out of memory", "taylor at 512": "out of memory",
    }  # fmt: skip
    assert advice.row("taylor", 512) is None
    peaks = {"forward": 7_000_000, "step": 7_000_000}
    assert advice.peak_bytes == dict.fromkeys((SDPA, "linear", "performer", "efficient"), peaks)


def test_text_and_json_say_the_same(known_times):
    text = format_advice(known_times)
    lines = text.splitlines()
    table = [line.split()[0] for line in lines[3:7]]
    assert table == ["performer", "linear", SDPA, "efficient"]
    assert "Forward: performer is fastest at 512 tokens" in text
    assert "performer pays from 256 tokens or fewer" in text
    assert "Left out: longformer: no such shape" in text
    assert "was not measured" in lines[-1]
    data = known_times.to_dict()
    assert data["ranking"]["step"] == table
    assert data["crossover"]["forward"]["efficient"] == {"length": None, "at_most": False}


def test_the_front_and_the_recommendation_from_known_errors(known_times):
    errors = {"linear": 0.5, "performer": 0.7, "efficient": 0.1}
    advice = dataclasses.replace(known_times, errors=errors)
    assert advice.front() == ["performer", "linear", SDPA]  # efficient is slower than SDPA, which loses nothing
    assert advice.recommendation() == "linear"
    text = format_advice(advice, "--calibration mine.txt")
    command = (
        f"hf-linear-attn convert {advice.model} linear --max-length 512 --calibration mine.txt --output outputs/linear"
    )
    assert text.splitlines()[-1].strip() == command
    assert [line.split()[-1] for line in text.splitlines()[3:7]] == ["0.700*", "0.500*", "0.000*", "0.100"]
    assert advice.to_dict()["recommendation"] == "linear"
    slower = dataclasses.replace(advice, errors={**errors, "performer": 0.4})
    assert slower.front() == ["performer", SDPA]
    assert slower.recommendation() == "performer"
    assert known_times.front() == []
    assert known_times.recommendation() is None
    reads = dataclasses.replace(advice, limit=512)
    assert "--max-length" not in format_advice(reads)


def test_errors_are_those_of_starts_on_documents_that_did_not_choose_them(tmp_path):
    """Against a conversion of the model, calibrated on the same half and run on the other one."""
    model = build(BertModel, tiny_config("bert"))
    batches = [token_batch(batch=1, length=length, seed=seed) for seed, length in enumerate((20, 24, 12, 22))]
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), unk_token="[UNK]"
    )
    tokenizer.save_pretrained(tmp_path)
    asked = []

    def documents(tokenizer, limit):
        asked.append(limit)
        return batches

    methods = [Method("linear"), Method("efficient"), Method("longformer", {"window_size": 128})]
    errors = start_errors(str(tmp_path), methods, documents, 48)
    assert asked == [48]
    assert errors["longformer window_size=128"] < 1e-5
    for key in ("linear", "efficient"):
        converted = convert_model(copy.deepcopy(model), key, calibration=batches[::2]).eval()
        found = []
        for layer, recording in record(converted, batches[1::2]).items():
            variant, squares = converted.encoder.layer[layer].attention.self.linear_attn, []
            for inputs, softmax in zip(recording.inputs, recording.outputs, strict=True):
                with torch.no_grad():
                    squares.append(((variant(inputs)[0] - softmax).square().sum(), softmax.square().sum()))
            error, norm = map(sum, zip(*squares, strict=True))
            found.append((error / norm).sqrt().item())
        assert errors[key] == pytest.approx(sum(found) / 2, rel=1e-4)
    with pytest.raises(ValueError, match="two documents at least"):
        start_errors(str(tmp_path), methods, lambda *_: batches[:1], 48)
    with pytest.raises(TypeError, match="a config has none"):
        advise(model.config, 48, documents=documents)


def test_where_nothing_pays_the_text_says_so(monkeypatch, clock):
    models = {SDPA: Timed(clock, lambda n: 1e-3), "linear": Timed(clock, lambda n: 4e-3)}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, {}))
    advice = advise(tiny_config("bert"), 64, variants="linear", training=False, repeats=3)
    assert advice.work == ("forward",)
    assert advice.smallest_crossover() is None
    assert "Forward: no variant is faster than SDPA at 64 tokens." in format_advice(advice)
    with pytest.raises(ValueError, match="work='step'; measured here: forward"):
        advice.ranking("step")


def test_running_out_of_memory_on_softmax_is_an_error(monkeypatch, clock):
    models = {SDPA: Timed(clock, lambda n: 0.0, limit=8), "linear": Timed(clock, lambda n: 0.0)}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, {}))
    with pytest.raises(torch.OutOfMemoryError):
        advise(tiny_config("bert"), 64, variants="linear", **QUICK)


@pytest.mark.parametrize(("budget", "rounds"), [(1e-6, 3), (5.0, 4), (1e6, 7)])
def test_rounds_fit_the_budget(monkeypatch, clock, budget, rounds):
    """Two contenders of 0.5 s: a round is 1 s, the first one is not kept, and 3 are kept whatever they take."""
    models = {name: Timed(clock, lambda n: 0.5) for name in (SDPA, "linear")}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, {}))
    options = {"lengths": [], "training": False, "budget_seconds": budget}
    advice = advise(tiny_config("bert"), 64, variants="linear", **options)
    assert [model.calls for model in models.values()] == [1 + rounds + 1] * 2  # one more for its memory
    assert advice.scatter == 0
    assert "scatter" not in format_advice(advice)


def test_an_overspent_budget_leaves_one_round_to_the_longer_lengths(monkeypatch, clock):
    models = {name: Timed(clock, lambda n: 0.5) for name in (SDPA, "linear")}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, {}))
    advice = advise(tiny_config("bert"), 64, variants="linear", lengths=[32], training=False, budget_seconds=2)
    assert [model.calls for model in models.values()] == [(1 + 3) + (1 + 1) + 1] * 2
    assert advice.lengths == (32, 64)


def test_a_busy_machine_is_told(monkeypatch, clock):
    times = iter([1.0, 1.0, 1.0, 2.0, 4.0, 1.0])
    models = {SDPA: Timed(clock, lambda n: next(times)), "linear": Timed(clock, lambda n: 1.0)}
    monkeypatch.setattr(advise_layers, "build_contenders", lambda *args: (models, {}))
    advice = advise(tiny_config("bert"), 64, variants="linear", lengths=[], training=False, repeats=4)
    assert advice.scatter == pytest.approx(1.0)  # of 1, 1, 2, 4: quartiles 1 and 2.5, median 1.5
    assert "scatter by 100%" in format_advice(advice)


@pytest.mark.parametrize("family", list_patchers())
def test_every_family_is_measured_from_its_config(family, monkeypatch):
    known_memory(monkeypatch)
    config = tiny_config(family)
    before = copy.deepcopy(config.to_dict())
    done = []
    entries = [("longformer", {"window_size": 16})]
    advice = advise(config, 200, variants=entries, lengths=[16], on_step=lambda *step: done.append(step), **QUICK)
    assert config.to_dict() == before
    name = "longformer window_size=16"
    assert [(row.name, row.length) for row in advice.rows] == [(SDPA, 16), (name, 16), (SDPA, 200), (name, 200)]
    assert all(seconds > 0 for row in advice.rows for seconds in row.seconds.values())
    assert advice.options == {name: {"window_size": 16}}
    assert (advice.family, advice.layers, len(done)) == (family, 1, 2 * 2 * 2 * 2)
    assert format_advice(advice)


def test_contenders_share_the_weights_of_one_model():
    shape = advise_layers.layer_config(tiny_config("bert"), 200, 1)
    sparse = Method("sparse", {"heads": ("far", "near")})
    models, refused = advise_layers.build_contenders(
        shape,
        [Method("t2r"), sparse],
        torch.device("cpu"),
        torch.float32,
    )
    assert refused[sparse.name].startswith("heads names 2 heads, the layer has 4")
    assert list(models) == [SDPA, "t2r"]
    own = {id(p) for name, p in models["t2r"].named_parameters() if "linear_attn" not in name}
    assert own == {id(p) for p in models[SDPA].parameters()}
    data = advise_layers.Embeddings(shape, 200, 2, torch.device("cpu"), torch.float32)
    outputs = [model(inputs_embeds=data.tensor).last_hidden_state for model in models.values()]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


def test_default_variants_are_those_of_the_side_that_are_not_quadratic():
    for family in ("bert", "gpt2"):
        config = tiny_config(family)
        causal = get_patcher(family).is_causal(config)
        keys = {method.key for method in advise_layers.choose_variants(config, None)}
        sides = list_variants(decoder=True) if causal else list_variants(encoder=True)
        assert keys == {key for key in sides if get_variant(key).claims_linear_cost({})}


def test_a_folder_and_a_batch(tmp_path):
    tiny_config("roberta").save_pretrained(tmp_path)
    advice = advise(tmp_path, 32, variants=[{"linear": {"feature_map": "relu"}}], batch_size=3, layers=5, **QUICK)
    assert (advice.model, advice.family, advice.batch_size, advice.layers) == (str(tmp_path), "roberta", 3, 2)
    assert advice.lengths == (16, 32)
    assert {tuple(peaks) for peaks in advice.peak_bytes.values()} == {("forward", "step")}


@pytest.mark.usefixtures("past_only")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length=0"),
        ({"length": True}, "length=True"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"layers": 0}, "layers=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"budget_seconds": 0}, "budget_seconds=0"),
        ({"lengths": [65]}, "allowed: integers from 1 to length=64"),
        ({"variants": []}, "variants is empty"),
        ({"variants": ["linaer"]}, "Did you mean 'linear'"),
        ({"variants": [3]}, "got 3"),
        ({"variants": [("linear", {"nope": 1})]}, "Unknown option"),
        ({"variants": "past_only"}, "'past_only' does not serve an encoder such as bert"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        advise(**{"model": tiny_config("bert"), "length": 64, **options})


def test_models_that_cannot_be_advised_on():
    from transformers import AutoModel, T5Config

    converted = convert_model(AutoModel.from_config(tiny_config("bert")), "linear")
    with pytest.raises(ValueError, match="converted already"):
        advise(converted.config, 64)
    with pytest.raises(ValueError, match="'t5' is not supported"):
        advise(T5Config(), 64)
    with pytest.raises(TypeError, match="got BertModel"):
        advise(AutoModel.from_config(tiny_config("bert")), 64)


def test_crossover_is_interpolated_after_the_last_length_that_is_slower():
    assert crossover_length([256, 1024], [0.5, 2.0]) == Crossover(512)
    assert crossover_length([128, 256, 512, 1024], [1.2, 0.5, 1.0, 4.0]) == Crossover(512)
    assert crossover_length([128, 256], [1.1, 1.2]) == Crossover(128, at_most=True)
    assert crossover_length([128, 256], [1.1, 0.9]) == Crossover(None)
    assert str(Crossover(128, at_most=True)) == "<= 128"
    for lengths, ratios in (([], []), ([2, 1], [1.0, 1.0]), ([1], [1.0, 2.0])):
        with pytest.raises(ValueError, match="rising lengths"):
            crossover_length(lengths, ratios)


def test_default_lengths():
    assert default_lengths(4096) == (256, 512, 1024, 2048, 4096)
    assert default_lengths(3000) == (375, 750, 1500, 3000)
    assert default_lengths(200) == (100, 200)
    assert default_lengths(1) == (1,)
