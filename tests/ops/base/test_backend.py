"""Which code runs the ops: the choice is visible, checked before anything changes, and never saved."""

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch

from hf_linear_attn import convert_model, get_variant, list_variants, set_backend
from hf_linear_attn.ops.base import backend
from tests.tiny import base_model, main_family, outputs_of, token_batch

SPECS = [get_variant(key) for key in list_variants()]
SERVED = [(spec, causal) for spec in SPECS for causal in (False, True) if (spec.decoder if causal else spec.encoder)]
WITH_KERNEL = [(spec.key, main_family(causal)) for spec, causal in SERVED if spec.has_kernel(causal)]
WITHOUT_KERNEL = [(spec.key, main_family(causal)) for spec, causal in SERVED if not spec.has_kernel(causal)]
# Why kernels do not run here, with Triton and without.
REASON = "triton is not installed"
if importlib.util.find_spec("triton") is not None:
    REASON = "the tensors are on device 'cpu', the kernels need a GPU"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._log_once.cache_clear()


@pytest.mark.parametrize("given", ["cuda", "", None, 1])
def test_an_unknown_backend_changes_nothing(given):
    model = base_model("bert")
    with pytest.raises(ValueError, match=rf"backend={given!r}; allowed: auto, triton, torch"):
        convert_model(model, "linear", backend=given)
    assert model.config.model_type == "bert"


@pytest.mark.parametrize(("key", "family"), WITHOUT_KERNEL)
def test_triton_is_refused_for_a_method_without_a_kernel(key, family):
    model = base_model(family)
    with pytest.raises(ValueError, match=f"{key} has no Triton kernel for .*coders. Allowed: 'auto', 'torch'"):
        convert_model(model, key, backend="triton")
    assert model.config.model_type == family
    convert_model(model, key)
    with pytest.raises(ValueError, match=f"{key} has no Triton kernel"):
        set_backend(model, "triton")


@pytest.mark.parametrize(("key", "family"), WITH_KERNEL)
def test_triton_raises_where_it_cannot_run(key, family):
    model = convert_model(base_model(family), key, backend="triton")
    with pytest.raises(RuntimeError, match=rf"backend='triton' cannot run: {REASON}\. Allowed here: 'auto', 'torch'"):
        model(**token_batch())
    outputs_of(set_backend(model, "auto"), token_batch())


def test_the_environment_says_what_auto_means(monkeypatch):
    model = convert_model(base_model("gpt2"), "linear")
    before = outputs_of(model, token_batch())
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run"):
        model(**token_batch())
    assert torch.equal(outputs_of(set_backend(model, "torch"), token_batch())[0], before[0])  # a choice of the model
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "gpu")
    with pytest.raises(ValueError, match="HF_LINEAR_ATTN_BACKEND='gpu'; allowed: auto, triton, torch"):
        model(**token_batch()) if set_backend(model, "auto") else None


def test_the_reason_is_logged_once(caplog):
    model = convert_model(base_model("gpt2"), "linear")
    with caplog.at_level(logging.INFO, logger=backend.logger.name):
        for _ in range(2):
            outputs_of(model, token_batch())
    assert [record.message for record in caplog.records] == [
        f"Converted layers run plain PyTorch (backend 'torch'): {REASON}."
    ]


def test_a_checkpoint_does_not_remember_it(tmp_path):
    model = convert_model(base_model("gpt2"), "linear", backend="torch")
    model.save_pretrained(tmp_path)
    assert {m.backend for m in type(model).from_pretrained(tmp_path).modules() if hasattr(m, "backend")} == {"auto"}


def test_a_softmax_model_has_none():
    with pytest.raises(ValueError, match="set_backend takes a converted model"):
        set_backend(base_model("bert"), "torch")


def test_without_triton_everything_runs(monkeypatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.machine_refusal("cuda", 0) == "triton is not installed"
    assert not backend.use_triton("auto", torch.ones(1))


def test_triton_is_not_imported_on_a_cpu():
    program = (
        "import sys; from tests.tiny import *; from hf_linear_attn import convert_model;"
        "outputs_of(convert_model(base_model('gpt2'), 'linear'), token_batch());"
        "assert not [name for name in sys.modules if name.startswith('hf_linear_attn.kernels.')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_choice_compiles_into_one_graph(monkeypatch):
    choose = torch.compile(lambda x: x + 1 if backend.use_triton("auto", x) else x * 2, fullgraph=True, backend="eager")
    assert torch.equal(choose(torch.ones(2)), torch.full((2,), 2.0))
