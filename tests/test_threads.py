"""First use from many threads, each in a process of its own: nobody sees half a registry or a second class."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tests.tiny as tiny
from hf_linear_attn import convert_model
from hf_linear_attn.auto_config import made_once
from hf_linear_attn.registry import PATCHERS, VARIANTS, Registry

# Runs `use(number)` in 8 threads that start at the same moment.
THREADS = """
import sys, threading
from pathlib import Path
barrier, results, errors = threading.Barrier(8), [], []
def run(number):
    barrier.wait()
    try:
        results.append(use(number))
    except BaseException as error:
        errors.append(f"{type(error).__name__}: {error}")
def race():
    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    assert not errors, errors
"""


def in_new_process(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", THREADS + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_first_look_into_the_registry() -> None:
    code = """
from hf_linear_attn.registry import get_variant, list_variants
def use(number):
    key = get_variant("performer").key if number % 2 else "performer"
    return key, tuple(list_variants())
race()
assert len(set(results)) == 1 and len(results[0][1]) > 20, results
"""
    in_new_process(code)


def test_first_look_while_methods_are_imported_by_name() -> None:
    """The thread that discovers waits for imports of the others, which must not wait for it."""
    code = """
import importlib
import hf_linear_attn
names = ["performer", "linear", "bigbird", "taylor", "memory", "rfa", "gated"]
def use(number):
    if number == 7:
        return hf_linear_attn.get_variant("performer").key
    importlib.import_module("hf_linear_attn.variants." + names[number])
    return hf_linear_attn.get_variant(names[number]).key
race()
assert sorted(results) == sorted([*names, "performer"]), results
"""
    in_new_process(code)


def test_first_conversion() -> None:
    code = """
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model
torch.manual_seed(0)
small = dict(vocab_size=31, num_hidden_layers=2, num_attention_heads=2)
models = [
    GPT2Model(GPT2Config(n_embd=16, n_positions=32, **small)) if number % 2
    else BertModel(BertConfig(hidden_size=16, intermediate_size=16, max_position_embeddings=32, **small))
    for number in range(8)
]
from hf_linear_attn import convert_model
from hf_linear_attn.auto_config import made_once
def use(number):
    model = convert_model(models[number], "performer", num_features=8)
    attention = [module for module in model.modules() if hasattr(module, "linear_attn")][0]
    return type(model), type(attention), type(model.config)
race()
assert len(set(results)) == 2, results
"""
    in_new_process(code)


def test_first_load(tmp_path: Path) -> None:
    """Models are built from the loaded config: Transformers' own weight loading is not for several threads."""
    for family in ("bert", "gpt2"):  # half of the threads each
        convert_model(tiny.base_model(family), "performer", num_features=8).save_pretrained(tmp_path / family)
    code = """
import hf_linear_attn
from transformers import AutoConfig, AutoModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
def use(number):
    config = AutoConfig.from_pretrained(Path(sys.argv[1]) / ("gpt2" if number % 2 else "bert"))
    return type(config), type(AutoModel.from_config(config)), TOKENIZER_MAPPING[type(config)]
race()
assert len(set(results)) == 2, results
"""
    in_new_process(code, tmp_path)


def test_a_broken_module_is_an_error_every_time(tmp_path: Path) -> None:
    """Also where it fails after it has registered; once it is mended, everything is there."""
    package = tmp_path / "methods"
    package.mkdir()
    (package / "__init__.py").touch()
    template = (
        "from home import REGISTRY\nclass Entry:\n    pass\nentry = Entry()\nREGISTRY.register({key!r}, entry)\n{rest}"
    )
    (tmp_path / "home.py").write_text(
        "from hf_linear_attn.registry import Registry\nREGISTRY = Registry('attention variant', 'methods')\n"
    )
    (package / "a.py").write_text(template.format(key="a", rest=""))
    (package / "b.py").write_text(template.format(key="b", rest="import no_such_module\n"))
    (package / "c.py").write_text(template.format(key="c", rest=""))
    code = """
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
from home import REGISTRY
asks = [REGISTRY.names, lambda: REGISTRY.get("a"), lambda: "a" in REGISTRY, lambda: REGISTRY.get("b")]
for ask in [*asks, *asks]:
    try:
        ask()
    except ModuleNotFoundError as error:
        assert "no_such_module" in str(error), error
    else:
        raise AssertionError("half a registry answered")
try:
    import methods.b
except ModuleNotFoundError:
    pass
broken = Path(sys.argv[1]) / "methods" / "b.py"
broken.write_text(broken.read_text().replace("import no_such_module", ""))
assert REGISTRY.names() == ["a", "b", "c"], REGISTRY.names()
import methods.b
assert REGISTRY.get("b") is methods.b.entry
"""
    in_new_process(code, tmp_path)


def test_two_objects_under_one_key() -> None:
    registry: Registry[object] = Registry("thing", "hf_linear_attn.variants")
    registry.register("x", registry)
    registry.register("x", registry)
    with pytest.raises(ValueError, match="already registered"):
        registry.register("x", object())


@pytest.mark.parametrize("key", [None, 7, ["performer"], {"a": 1}, float("nan")], ids=str)
def test_a_key_of_any_type_is_unknown(key: object) -> None:
    for registry in (VARIANTS, PATCHERS):
        assert key not in registry
        with pytest.raises(ValueError, match="Unknown"):
            registry.get(key)  # type: ignore[arg-type]


def test_two_threads_make_one_class() -> None:
    @made_once
    def make(name: str) -> type:
        time.sleep(0.05)  # the other thread arrives
        return type(name, (), {})

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(make, ["Model"] * 4))) == 1
