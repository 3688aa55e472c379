"""Checkpoints that someone edited, cut short or mixed up: one sentence each, or the function that the config says."""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, BertForMaskedLM, PreTrainedModel
from transformers.utils import logging

import tests.tiny as tiny
from hf_linear_attn import convert_model, list_variants
from hf_linear_attn.registry import get_patcher

SEED = 10
CASES = 55  # for each variant
SECONDS = 10.0  # of processor time a case may take; a sound load takes about 0.05
SLACK = 64 * 2**20  # bytes that a case may touch beyond four times the checkpoint: caches of the allocator
RESERVED = 2**30  # bytes that a case may ask for beyond what the process has: a larger request fails
SENTENCES = (ValueError, OSError)

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e300),
    *(math.nan, math.inf, -math.inf, "", "x", "none", "performer", "bigbird", "tile", "rotary", "5"),
    *([], [1], [None], [[1]], ["x", 3], [True, False], {}, {"a": 1}, {"variant": "performer"}, [{}]),
]
UPSTREAM_FIELDS = (  # that decide what is built, or how large it is
    *("architectures", "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"),
    *("max_position_embeddings", "is_decoder", "head_dim", "num_key_value_heads", "pad_token_id", "dtype"),
    *("n_layer", "n_embd", "n_head", "n_positions", "intermediate_size"),
)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)


def save_checkpoints(variant: str, folder: Path) -> Path:
    """A converted tiny model and its upstream twin; some are mixed, some had their positions extended."""
    number = list_variants().index(variant)
    families = [family for family in ("bert", "gpt2", "llama") if variant in tiny.variants_for(family)]
    family = families[number % len(families)]
    model = tiny.base_model(family, max_position_embeddings=24, **tiny.without_dropout(family))
    model.save_pretrained(folder / "upstream")
    choice: Any = {0: variant} if number % 4 == 1 else variant
    convert_model(model, choice, max_length=40 if number % 3 == 0 else None, **tiny.small_options(variant, family))
    model.save_pretrained(folder / "sound")
    return folder / "sound"


def places(node: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in entries:
        yield from places(value, (*place, key))


def damage_config(rng: random.Random, config: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Change, remove or double one field; returns its place and what was done."""
    if rng.random() < 0.7:
        place = ("linear_attn", *rng.choice(list(places(config["linear_attn"]))))
    else:
        place = (rng.choice([name for name in UPSTREAM_FIELDS if name in config]),)
    node = config
    for key in place[:-1]:
        node = node[key]
    old, action = node[place[-1]], rng.random()
    if action < 0.1:
        del node[place[-1]]
        return place, "removed"
    if action < 0.15 and isinstance(old, list):
        old.extend(copy.deepcopy(old))
        return place, "doubled"
    if action < 0.2 and isinstance(old, dict):
        old["unknown"] = 1
        return place, "a key more"
    node[place[-1]] = copy.deepcopy(rng.choice(VALUES))
    return place, node[place[-1]]


def damage_file(rng: random.Random, folder: Path) -> str:
    """Damage the weights or the config as files; returns how."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    kind = rng.choice(
        ["cut", "cut config", "bytes", "empty", "gone", "not utf-8", "a list", "nan config"]
        + ["renamed", "dropped", "shape", "transposed", "kind", "added"] * 2
    )
    raw = weights.read_bytes()
    if kind == "cut":
        weights.write_bytes(raw[: rng.randrange(len(raw))])
    elif kind == "bytes":
        header = bytearray(raw)
        header[rng.randrange(200)] = rng.randrange(256)
        weights.write_bytes(bytes(header))
    elif kind == "empty":
        rng.choice([weights, config]).write_bytes(b"")
    elif kind == "gone":
        rng.choice([weights, config]).unlink()
    elif kind == "cut config":
        config.write_bytes(config.read_bytes()[: rng.randrange(config.stat().st_size - 2)])
    elif kind == "not utf-8":
        config.write_bytes(b"\xff\xfe" + config.read_bytes())
    elif kind == "a list":
        config.write_text("[1]", encoding="utf-8")
    elif kind == "nan config":
        config.write_text("NaN", encoding="utf-8")
    else:
        tensors = load_file(weights)
        ours = [name for name in tensors if ".linear_attn." in name]
        name = rng.choice(ours or list(tensors)) if rng.random() < 0.6 else rng.choice(list(tensors))
        kind = f"{kind} {name}"
        tensor = tensors.pop(name)
        changed = {
            "renamed": {f"{name}_": tensor},
            "dropped": {},
            "shape": {name: torch.cat([tensor, tensor])},
            "transposed": {name: tensor.flatten()[None]},
            "kind": {name: tensor.to(torch.int32 if tensor.is_floating_point() else torch.float32)},
            "added": {name: tensor, f"{name}_more": tensor.clone()},
        }[kind.split()[0]]
        save_file({**tensors, **changed}, weights, metadata={"format": "pt"})
    return kind


@contextmanager
def within_bounds(checkpoint: Path) -> Iterator[None]:
    """Fails a case that takes long, touches more memory than the checkpoint accounts for, or asks for very much."""
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + RESERVED, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < SECONDS
    touched = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert touched < 4 * size + SLACK, f"{touched:,} bytes"


def upstream_error(folder: Path, sound: Path, place: tuple[Any, ...] | None) -> type[BaseException] | None:
    """What Transformers makes of the same damage in its own checkpoint."""
    twin = folder.parent / "twin"
    shutil.rmtree(twin, ignore_errors=True)
    shutil.copytree(sound.parent / "upstream", twin)
    if place is None:
        shutil.copy(folder / "config.json", twin)
    else:
        config = json.loads((twin / "config.json").read_text(encoding="utf-8"))
        damaged = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config.pop(place[0], None)
        config.update({name: damaged[name] for name in place[:1] if name in damaged})
        (twin / "config.json").write_text(json.dumps(config), encoding="utf-8")
    try:
        AutoModel.from_pretrained(twin)
    except Exception as error:
        return type(error)
    return None


def converted_as_told(config: Any, folder: Path) -> PreTrainedModel:
    """What the config says, by another way than a reload: an upstream model converted, given the file's tensors."""
    patcher: Any = get_patcher(config.base_model_type)
    drop = ("model_type", "architectures", "linear_attn", "attn_implementation")
    fields = {name: value for name, value in config.to_dict().items() if name not in drop}
    upstream = AutoModel.from_config(patcher.config_class(**fields), dtype=config.dtype)
    layers = config.linear_attn["layers"]
    choice = {i: (layer["variant"], layer["options"]) for i, layer in enumerate(layers) if layer is not None}
    model = convert_model(upstream, choice) if choice else upstream
    tensors = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = set(model.all_tied_weights_keys)
    assert not unexpected
    assert set(missing) <= tied
    model.tie_weights()
    return model.eval()


def check_case(folder: Path, sound: Path, place: tuple[Any, ...] | None, told: str) -> str:
    """Load once; "ok", "sentence" or "upstream", or an assertion that fails."""
    error: Exception | None = None
    with within_bounds(folder):
        try:
            model = AutoModel.from_pretrained(folder)
        except Exception as raised:
            error = raised
    if error is None:
        batch = tiny.token_batch(length=19)
        tiny.assert_bit_equal(
            tiny.outputs_of(model.eval(), batch), tiny.outputs_of(converted_as_told(model.config, folder), batch)
        )
        return "ok"
    sentence = str(error)
    if place is not None and place[0] == "linear_attn":
        assert isinstance(error, ValueError), (told, error)
        assert f"{folder}/config.json: " in sentence or ("do not fit" in sentence and str(folder) in sentence), told
        keys = [key for key in place if isinstance(key, str)]
        assert "do not fit" in sentence or any(key in sentence for key in keys[-2:]), (told, sentence)
        return "sentence"
    if isinstance(error, SENTENCES) and len(sentence) > 20:
        return "sentence"
    assert upstream_error(folder, sound, place) is type(error), (told, repr(error))
    return "upstream"


@pytest.mark.parametrize("variant", list_variants())
def test_damage_is_a_sentence_or_does_what_it_says(variant: str, tmp_path: Path) -> None:
    sound = save_checkpoints(variant, tmp_path)
    AutoModel.from_pretrained(sound)  # what is cached once is not this case's
    rng = random.Random(f"{SEED} {variant}")
    outcomes: dict[str, int] = {}
    folder = tmp_path / "damaged"
    for _ in range(CASES):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        place = None
        if rng.random() < 0.7:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            place, done = damage_config(rng, config)
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
            told = f"{place} {done!r}"
        else:
            told = damage_file(rng, folder)
        try:
            outcome = check_case(folder, sound, place, told)
        except BaseException as failure:
            failure.add_note(f"{variant}: {told}")
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert outcomes["sentence"] > CASES // 3


@pytest.mark.parametrize(
    "architectures", [None, [], "x", 7, True, {"a": 1}, ["BertForMaskedLM"], ["x"], [None], [7]], ids=str
)
def test_missing_weights_raise_whatever_architectures_says(tmp_path: Path, architectures: Any) -> None:
    model = tiny.build(BertForMaskedLM, tiny.tiny_config("bert"))
    convert_model(model, "performer", num_features=8).save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "architectures": architectures}), encoding="utf-8")
    try:
        AutoModelForMaskedLM.from_pretrained(tmp_path)  # complete
    except StrictDataclassFieldValidationError:
        return  # Transformers 5.17 checks the field's type itself
    tensors = load_file(weights)
    for name in ("cls.predictions.transform.dense.weight", "bert.encoder.layer.1.output.dense.weight"):
        save_file({key: x for key, x in tensors.items() if key != name}, weights, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"missing keys: {name}"):
            AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_model_without_the_saved_head_may_be_loaded(tmp_path: Path) -> None:
    """And one of its weights that is missing is an error although the class is another."""
    model = tiny.build(BertForMaskedLM, tiny.tiny_config("bert"))
    convert_model(model, "performer", num_features=8).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "LinearAttnBertModel"  # with a new pooler
    weights, name = tmp_path / "model.safetensors", "bert.encoder.layer.1.output.dense.weight"
    tensors = load_file(weights)
    save_file({key: x for key, x in tensors.items() if key != name}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: encoder\.layer\.1\.output\.dense\.weight"):
        AutoModel.from_pretrained(tmp_path)
