"""A conversion that is interrupted, at any line of its code, leaves the model as it was."""

import random
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from hf_linear_attn import convert_model
from tests.test_convert import assert_unchanged, snapshot
from tests.tiny import base_model, causal_lm, token_batch

FILES = ("convert.py", "auto.py", "positions.py", "places.py", "sharing.py")
# Functions with a `with` of PyTorch's: a line that ends one is traced before its exit, which an interrupt there skips.
LEAKY = ("_build", "build_variants")


class Interrupt:
    """Raise at the n-th line that is executed in `FILES`; count them all if n is 0."""

    def __init__(self, n: int) -> None:
        self.n, self.lines = n, 0

    def __call__(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        inside = frame.f_code.co_filename.endswith(FILES) and frame.f_code.co_name not in LEAKY
        return self.line if inside else None

    def line(self, _frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.line

    def run(self, model: nn.Module, variant: str, **options: Any) -> None:
        sys.settrace(self)
        try:
            convert_model(model, variant, **options)
        finally:
            sys.settrace(None)


@pytest.mark.parametrize(
    ("make", "variant", "options"),
    [
        (lambda: base_model("bert"), "linear", {"max_length": 300, "extend": "interpolate"}),
        (lambda: base_model("distilbert"), "longformer", {"max_length": 300}),
        pytest.param(
            lambda: causal_lm("gpt2"),
            "hedgehog",
            {"layers": "auto", "keep_softmax": 1, "calibration": [token_batch(length=16)], "calibration_steps": 1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["bert", "distilbert", "gpt2 auto"],
)
def test_an_interrupt_anywhere(make: Any, variant: str, options: dict[str, Any]) -> None:
    for _ in range(2):  # the first conversion of a process makes classes that later ones find
        whole = Interrupt(0)
        whole.run(make(), variant, **options)
    points = random.Random(0).sample(range(1, whole.lines), 60)
    points += range(whole.lines - 40, whole.lines)  # the end, where most is done, up to the last line, a return
    for n in points:
        model = make()
        before, parameters = snapshot(model), dict(model.named_parameters())
        with pytest.raises(KeyboardInterrupt):
            Interrupt(n).run(model, variant, **options)
        assert torch.is_grad_enabled()
        assert torch.get_default_device() == torch.device("cpu")
        assert_unchanged(model, before)
        assert all(x is parameters[name] for name, x in model.named_parameters()), "an optimizer has lost its tensors"
        convert_model(model, variant, **options)
