"""Bad arguments of the public functions: a sentence that names them, and the model as it was."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tests.tiny as tiny
from hf_linear_attn import convert_model, extend_positions, get_variant, list_variants, revert_model, set_backend

BAD_CONVERSIONS: list[dict[str, Any]] = [
    *({"variant": x} for x in (None, 7, [], "performr", b"performer", {}, {0: 7}, {0: ("performer",)}, {0: []})),
    *({"variant": x} for x in ({0: ("performer", 7)}, {0: (7, {})}, {0: ([], {})}, {True: "linear"}, {"0": "linear"})),
    *({"variant": x} for x in ({2: "linear"}, {-1: "linear"}, {0: ("performer", {"seed": []})}, {None: "linear"})),
    *({"variant": {0: ("performer", {})}, "num_features": 8}, {"variant": {0: "linear"}, "layers": [0]}),
    *(
        {"layers": x}
        for x in (7, True, 0.5, "all", b"0", [], [2], [-1], [0.5], ["0"], [None], [[0]], [{}], [True], {0: 1})
    ),
    *({"keep_softmax": x} for x in (1, "1", -1)),
    *({"layers": "auto", "keep_softmax": x} for x in (None, 0, 2, True, "1", 1.0, 1)),
    *({"max_length": x} for x in (0, -1, 1.5, True, "512", [512], 10**30, math.nan, math.inf, 2**31 - 1)),
    *({"extend": x} for x in (None, 7, "stretch", ["tile"])),
    *({"calibration": x} for x in (7, True, "text", [], [7], ["text"], {}, [[1]], 0.5)),
    *({"calibration": [{"input_ids": torch.tensor([[5, x]])}]} for x in (-1, tiny.VOCAB, 10**9)),
    *({"calibration": [{"input_ids": x}]} for x in ([[5, 6]], np.array([[5, 6]]), "5", None, True)),
    *({"calibration": [{"input_ids": torch.zeros(x, dtype=torch.long)}]} for x in ((4,), (2, 0))),
    *({"calibration": [{"inputs_embeds": torch.full(x, math.nan)}]} for x in ((1, 4, 32), (4, 32))),
    {"calibration": [{**tiny.token_batch(), "use_cache": False}]},
    *({"calibration": [tiny.token_batch()], "calibration_steps": x} for x in (-1, 1.5, True, "3", None, math.nan)),
    *({"calibration": [tiny.token_batch()], "calibration_lr": x} for x in (0, -1, True, "3", None, math.nan, math.inf)),
    *({"calibration_steps": 3}, {"backend": 7}, {"backend": "cuda"}, {"backend": ["torch"]}),
    *({"num_features": x} for x in (None, 0, -1, 1.5, True, "8", [8], 10**9, 10**30, math.nan)),
    *({"feature": 3}, {"kernel": []}, {"seed": -1}, {"orthogonal": 1}),
]


@pytest.mark.parametrize(
    "call", BAD_CONVERSIONS, ids=lambda call: " ".join(f"{k}={str(v)[:24]}" for k, v in call.items())
)
def test_bad_conversions_are_sentences(call: dict[str, Any]) -> None:
    model = tiny.base_model("bert")
    config, before = model.config.to_dict(), {name: x.clone() for name, x in model.state_dict().items()}
    names = "|".join([*call, "[Ll]ayer", "option", "calibration", "seed"])
    with pytest.raises((ValueError, TypeError), match=rf"\b({names})"):
        convert_model(model, **{"variant": "performer", **call})
    assert type(model).__name__ == "BertModel"
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_decoder_that_looks_both_ways_is_a_sentence(family: str) -> None:
    model = tiny.base_model(family)
    model.config.is_causal = False
    with pytest.raises(ValueError, match=r"is_causal=True, and the config asks for False"):
        convert_model(model, "linear")
    assert not type(model).__name__.startswith("LinearAttn")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_a_sentence(value: float, dtype: torch.dtype) -> None:
    model = tiny.base_model("bert").to(dtype)
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[3, 4] = value
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense\.weight holds nan or infinite"):
        convert_model(model, "performer")
    assert type(model).__name__ == "BertModel"


@pytest.mark.parametrize("value", [None, 7, "x", [], {}, torch.nn.Linear(2, 2)], ids=str)
def test_bad_models_are_sentences(value: Any) -> None:
    for call in (
        lambda: convert_model(value, "performer"),
        lambda: revert_model(value),
        lambda: set_backend(value, "torch"),
        lambda: extend_positions(value, 512),
    ):
        with pytest.raises((ValueError, TypeError), match=type(value).__name__):
            call()


@pytest.mark.parametrize("value", [7, "yes", [], {}, math.nan])
def test_sides_of_the_list_are_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match="encoder="):
        list_variants(encoder=value)
    with pytest.raises(ValueError, match="Unknown attention variant"):
        get_variant(value)
