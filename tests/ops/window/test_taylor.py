"""`taylor_window_attention` against the dense form in float64: outputs, every gradient, scales far apart, padding."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import ParametricMap, TaylorMap, taylor_features
from hf_linear_attn.ops.window import taylor as taylor_window
from hf_linear_attn.ops.window.tail import naive_window_tail_attention, window_tail_attention
from tests.ops.window.taylor_calls import F64, SCALING, assert_same, attend, draw, project, results

# Lengths around a chunk's, and windows of a token, uneven, of a chunk, and beyond the sequence.
LENGTHS = (1, 5, 63, 65, 200)
WINDOWS = ((0, 0), (3, 2), (32, 32), (0, 90), (300, 300))


@pytest.fixture(autouse=True)
def in_chunks(monkeypatch):
    """Fails a test in which the dense form is compared with another path."""
    calls = []
    function = taylor_window.taylor_window_attention

    def counted(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr("hf_linear_attn.ops.window.tail.taylor_window_attention", counted)
    yield
    assert calls


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_is_the_dense_form(length, window):
    assert_same(draw(length), window=window)


@pytest.mark.parametrize("window", [(3, 2), (0, 40), (300, 300)], ids=str)
@pytest.mark.parametrize("length", [7, 150])
def test_padding_is_not_seen(length, window):
    token_mask = torch.ones(2, length, dtype=torch.bool)
    token_mask[1, : length // 2] = False
    assert_same(draw(length), window=window, token_mask=token_mask)
    arguments = draw(length)
    output = attend(window_tail_attention, arguments, window=window, token_mask=token_mask)
    with torch.no_grad():
        for x in arguments[:3]:
            x[1, :, : length // 2] = 1e4
    again = attend(window_tail_attention, arguments, window=window, token_mask=token_mask)
    seen = token_mask[:, None].expand(2, 2, -1)
    torch.testing.assert_close(again[seen], output[seen], atol=0, rtol=0)


def test_rows_without_a_key_are_zero():
    token_mask = torch.zeros(2, 70, dtype=torch.bool)
    token_mask[0] = True
    output, *gradients = results(window_tail_attention, draw(70), window=(4, 4), token_mask=token_mask)
    assert (output[1] == 0).all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("slope", [10.0, 60.0])
def test_scales_of_any_size(slope, monkeypatch):
    """Weights of keys e^60 to e^300 apart: sums over chunks are each relative to their own largest."""
    monkeypatch.setattr(taylor_window, "_CHUNK", 8)
    arguments = draw(60, slope=slope)
    assert_same(arguments, window=(3, 3))
    expected = attend(naive_window_tail_attention, arguments, window=(3, 3))
    halved = [x.detach().float().requires_grad_() for x in arguments]
    output, *gradients = results(window_tail_attention, halved, window=(3, 3))
    assert all(x.isfinite().all() for x in gradients)
    # float32 has logs of weights to 1e-4 of such sizes, and so the weights themselves.
    torch.testing.assert_close(output.double(), expected, atol=1e-5 * slope, rtol=0)


def test_a_large_key_outside_hides_no_sums():
    """A key whose weight is large for distant rows alone: rows that have it in their window still have their tail."""
    arguments = draw(300, batch=1, heads=1, dim=3, rank=2)
    q, k, _, _, q_slope, _, k_slope, _ = arguments
    with torch.no_grad():
        q_slope.zero_()
        k_slope.copy_(torch.tensor([0.0, 0.0, 1.0]))
        k[..., 2] = 0
        k[0, 0, 150, 2] = 200.0  # a log scale of 200
        q[..., 2] = -1.0  # but a logit of -80
    assert_same(arguments, window=(32, 32))
    expected = attend(naive_window_tail_attention, arguments, window=(32, 32))
    output = attend(window_tail_attention, [x.detach().float() for x in arguments], window=(32, 32))
    # Each rounding of the log of such a weight moves it by 200 eps / 2; four of them, and a mean of these values.
    v = arguments[2]
    bound = 4 * 200 * torch.finfo(torch.float32).eps / 2 * float(v.max() - v.min())
    torch.testing.assert_close(output.double(), expected, atol=bound, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    narrow = [x.detach().to(dtype) for x in draw(130)[:3]]
    rest = [x.detach().float() for x in draw(130)[3:]]
    output = attend(window_tail_attention, [*narrow, *rest], window=(16, 16))
    wide = attend(window_tail_attention, [*(x.float() for x in narrow), *rest], window=(16, 16))
    torch.testing.assert_close(output.float(), wide, atol=0, rtol=0)


@pytest.mark.parametrize(("rows", "elements"), [(1, 1), (400, 2000), (1 << 20, 1)])
def test_groups_and_parts_change_nothing(rows, elements, monkeypatch):
    monkeypatch.setattr(taylor_window, "_CHUNK", 8)
    arguments = draw(150)
    whole = results(window_tail_attention, arguments, window=(20, 9))
    monkeypatch.setattr(taylor_window, "_CPU_ROWS", rows)
    monkeypatch.setattr(taylor_window, "_CPU_ELEMENTS", elements)
    for actual, expected in zip(results(window_tail_attention, arguments, window=(20, 9)), whole, strict=True):
        torch.testing.assert_close(actual, expected)


def test_items_of_a_batch_are_computed_alone():
    arguments = draw(150, batch=3)
    output = attend(window_tail_attention, arguments, window=(8, 8))
    with torch.no_grad():
        alone = attend(window_tail_attention, [*(x[1:2] for x in arguments[:3]), *arguments[3:]], window=(8, 8))
    torch.testing.assert_close(output[1:2], alone, atol=1e-14, rtol=1e-13)


def test_traced_calls_give_the_same(monkeypatch):
    """torch.compile takes the path by features."""
    arguments = draw(100)
    output = attend(window_tail_attention, arguments, window=(8, 8))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(attend(window_tail_attention, arguments, window=(8, 8)), output)


def test_maps_that_name_no_parameters_train():
    q, k, v, q_weight, q_slope, k_weight, k_slope, factor = arguments = draw(90)
    expected = results(window_tail_attention, arguments, window=(8, 8))
    maps = (TaylorMap(lambda x, p=p: project(x, *p)) for p in ((q_weight, q_slope), (k_weight, k_slope)))
    given = {"left": 8, "right": 8, "is_causal": False, "scaling": SCALING, "window_log_factor": factor}
    output, _ = window_tail_attention(q, k, v, *maps, **given)
    loss = output.square().sum() + (output * torch.linspace(-1, 1, 4, dtype=F64)).sum()
    for actual, wanted in zip(torch.autograd.grad(loss, arguments), expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_training_holds_neither_weights_nor_features():
    """Tokens, coordinates and the output: fewer numbers than a window's weights, or than features."""
    saved, arguments = [], [x.detach().float().requires_grad_() for x in draw(2048, batch=1, dim=8, rank=8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        output = attend(window_tail_attention, arguments, window=(32, 32))
    output.sum().backward()
    assert sum(saved) < 2 * 2048 * (9 * 8 + 24)


def test_a_second_derivative_is_refused():
    arguments = draw(200)
    output = attend(window_tail_attention, arguments, window=(2, 2))
    with pytest.raises(RuntimeError, match="is refused"):
        torch.autograd.grad(output.sum(), arguments[1:2], create_graph=True)


def test_a_taylor_map_is_its_features():
    q, *_, weight, slope, _ = draw(6)
    taylor_map = TaylorMap(ParametricMap(project, (weight, slope)))
    features, log_scale = taylor_map(q)
    coordinates, expected = project(q, weight, slope)
    torch.testing.assert_close(features, taylor_features(coordinates, 2)[0])
    torch.testing.assert_close(log_scale, expected)
    assert taylor_map.expanded().parameters == (weight, slope)
    attend(window_tail_attention, draw(6), window=(1, 1))
