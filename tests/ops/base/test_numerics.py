"""In which precision sums run, and fast exponentials."""

import pytest
import torch

from hf_linear_attn.ops.base import numerics


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_of_half_precision_are_float32(given, expected):
    assert numerics.accumulation_dtype(given) == expected


def test_autocast_is_off_inside():
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with numerics.full_precision(x):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exponentials_are_those_of_torch(dtype):
    x = torch.linspace(-80, 80, 1001, dtype=dtype)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(numerics.exp_(x.clone()), x.exp(), atol=0, rtol=80 * eps)
    assert numerics.exp_(torch.tensor([numerics.LOG_ZERO], dtype=dtype)).item() == 0
