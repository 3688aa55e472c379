"""`causal_taylor_window_attention` against the dense form in float64: gradients, padding, states, scales far apart."""

import pytest
import torch

from hf_linear_attn.ops.features.maps import ParametricMap, TaylorMap
from hf_linear_attn.ops.linear.attention import init_linear_state
from hf_linear_attn.ops.window import taylor_causal
from hf_linear_attn.ops.window.tail import naive_window_tail_attention, window_tail_attention
from tests.ops.window.taylor_calls import F64, SCALING, assert_same, attend, draw, project, results

# Lengths around a chunk's, and windows of a token, of a chunk, and of more, that some key leaves.
CASES = [(n, left) for n in (2, 5, 63, 65, 200) for left in (0, 3, 62, 63, 90) if left < n - 1]


@pytest.fixture
def in_blocks(monkeypatch):
    """Fails a test in which another path is compared."""
    calls = []
    function = taylor_causal.causal_taylor_window_attention

    def counted(*arguments, **options):
        calls.append(1)
        return function(*arguments, **options)

    monkeypatch.setattr("hf_linear_attn.ops.window.tail.causal_taylor_window_attention", counted)
    yield
    assert calls


def small(monkeypatch, size, rows):
    monkeypatch.setattr(taylor_causal, "_CHUNK", size)
    monkeypatch.setattr(taylor_causal, "_CPU_ROWS", rows)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize(("length", "left"), CASES)
def test_is_the_dense_form(length, left):
    assert_same(draw(length), window=(left, None))


@pytest.mark.parametrize(("length", "left"), [(5, 4), (65, 300)])
def test_without_a_tail(length, left):
    arguments = draw(length)
    expected, output = (
        attend(f, arguments, window=(left, None)) for f in (naive_window_tail_attention, window_tail_attention)
    )
    torch.testing.assert_close(output, expected)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("size", [5, 8, 64])
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("left", [0, 3, 31])
def test_chunks_and_blocks_change_nothing(left, rows, size, monkeypatch):
    small(monkeypatch, size, rows)
    assert_same(draw(130), window=(left, None))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("queries", [2, 3, 77])
@pytest.mark.parametrize("left", [0, 9, 40])
def test_keys_before_the_first_query(left, queries, monkeypatch):
    assert_same(draw(130, queries=queries), window=(left, None))
    small(monkeypatch, 8, 64)
    assert_same(draw(130, queries=queries), window=(left, None))


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("where", ["left", "right", "hole"])
@pytest.mark.parametrize(("length", "left"), [(7, 3), (150, 0), (150, 40)])
def test_padding_is_not_seen(length, left, where, monkeypatch):
    third = length // 3
    padded = {"left": slice(0, third), "right": slice(-third, None), "hole": slice(third, 2 * third)}[where]
    token_mask = torch.ones(2, length, dtype=torch.bool)
    token_mask[1, padded] = False
    arguments = draw(length)
    assert_same(arguments, window=(left, None), token_mask=token_mask)
    small(monkeypatch, 8, 64)
    assert_same(arguments, window=(left, None), token_mask=token_mask)
    output = attend(window_tail_attention, arguments, window=(left, None), token_mask=token_mask)
    with torch.no_grad():
        for x in arguments[:3]:
            x[1, :, padded] = 1e4
    again = attend(window_tail_attention, arguments, window=(left, None), token_mask=token_mask)
    seen = token_mask[:, None].expand(2, 2, -1)
    torch.testing.assert_close(again[seen], output[seen], atol=0, rtol=0)


def test_rows_without_a_key_are_zero():
    token_mask = torch.zeros(2, 140, dtype=torch.bool)
    token_mask[0, 100:] = True
    output, *gradients = results(window_tail_attention, draw(140), window=(4, None), token_mask=token_mask)
    assert (output[1] == 0).all()
    assert (output[0, :, :100] == 0).all()
    assert (output[0, :, 100:] != 0).all()
    assert all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("position", [1, 30, 64, 70, 100, 199])
def test_a_huge_later_key_changes_no_earlier_bit(position):
    arguments = [x.detach().float() for x in draw(200)]
    before = attend(window_tail_attention, arguments, window=(9, None))
    for size in (1e3, 1e6):
        changed = [x.clone() for x in arguments]
        for x in changed[1:3]:
            x[:, :, position] *= size
        after = attend(window_tail_attention, changed, window=(9, None))
        assert torch.equal(after[:, :, :position], before[:, :, :position])
        assert after.isfinite().all()


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("slope", [10.0, 60.0])
def test_scales_of_any_size(slope, monkeypatch):
    """Weights of keys e^60 to e^300 apart: sums are each relative to the largest so far."""
    small(monkeypatch, 8, 64)
    arguments = draw(60, slope=slope)
    assert_same(arguments, window=(3, None))
    expected = attend(naive_window_tail_attention, arguments, window=(3, None))
    halved = [x.detach().float().requires_grad_() for x in arguments]
    output, *gradients = results(window_tail_attention, halved, window=(3, None))
    assert all(x.isfinite().all() for x in gradients)
    # float32 has logs of weights to 1e-4 of such sizes, and so the weights themselves.
    torch.testing.assert_close(output.double(), expected, atol=1e-5 * slope, rtol=0)


def test_float32_is_close():
    arguments = draw(700, dim=16, rank=8, slope=1.0)
    expected = results(naive_window_tail_attention, arguments, window=(63, None))
    found = results(window_tail_attention, [x.detach().float().requires_grad_() for x in arguments], window=(63, None))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-4 * wanted.abs().amax().item(), rtol=0)


def in_pieces(arguments, left, ends):
    """The output over calls that end at `ends`, and the last state: as a layer decodes, with the keys of its window."""
    q, k, v, *rest = arguments
    state = init_linear_state(*q.shape[:2], 10, 4, q.dtype, "cpu")
    k, v = (torch.nn.functional.pad(x, (0, 0, left + 1, 0)) for x in (k, v))
    q_map, k_map = (TaylorMap(ParametricMap(project, tuple(rest[i : i + 2]))) for i in (0, 2))
    given = {"left": left, "right": 0, "is_causal": True, "scaling": SCALING, "window_log_factor": rest[4]}
    outputs = []
    for start, stop in zip((0, *ends), ends, strict=False):
        held = slice(start, stop + left + 1)
        real = (torch.arange(held.start, held.stop) > left)[None]
        call = q[:, :, start:stop], k[:, :, held], v[:, :, held], q_map, k_map
        output, state = window_tail_attention(*call, **given, token_mask=real, state=state)
        outputs.append(output)
    return torch.cat(outputs, 2), state


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("left", [0, 5, 70])
@pytest.mark.parametrize("ends", [(200,), (3, 4, 5, 90, 200), (100, 101, 180, 200)], ids=str)
def test_a_state_continues_the_call(left, ends, monkeypatch):
    """One token at a time is another form: states go from either to the other."""
    arguments = draw(200)
    whole, last = in_pieces(arguments, left, (200,))
    expected = attend(naive_window_tail_attention, arguments, window=(left, None))
    torch.testing.assert_close(whole, expected)
    small(monkeypatch, 8, 64)
    output, state = in_pieces(arguments, left, ends)
    torch.testing.assert_close(output, expected)
    total, wanted = (
        torch.cat([x["kv"], x["z"][..., None]], -1) * x["log_scale"].exp()[..., None, None] for x in (state, last)
    )
    torch.testing.assert_close(total, wanted)


@pytest.mark.usefixtures("in_blocks")
def test_gradients_through_a_state():
    def loss(output):
        return output.square().sum() + output[..., 0].sum()

    arguments = draw(90)
    expected = torch.autograd.grad(loss(attend(naive_window_tail_attention, arguments, window=(6, None))), arguments)
    found = torch.autograd.grad(loss(in_pieces(arguments, 6, (30, 31, 70, 90))[0]), arguments)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_a_state_before_any_key_has_no_scale():
    _, state = in_pieces(draw(5), 9, (5,))
    assert (state["kv"] == 0).all()
    assert (state["log_scale"] < -1e29).all()


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    narrow = [x.detach().to(dtype) for x in draw(130)[:3]]
    rest = [x.detach().float() for x in draw(130)[3:]]
    output = attend(window_tail_attention, [*narrow, *rest], window=(16, None))
    wide = attend(window_tail_attention, [*(x.float() for x in narrow), *rest], window=(16, None))
    torch.testing.assert_close(output.float(), wide, atol=0, rtol=0)


def test_items_of_a_batch_are_computed_alone():
    arguments = draw(150, batch=3)
    output = attend(window_tail_attention, arguments, window=(8, None))
    with torch.no_grad():
        alone = attend(window_tail_attention, [*(x[1:2] for x in arguments[:3]), *arguments[3:]], window=(8, None))
    torch.testing.assert_close(output[1:2], alone, atol=1e-14, rtol=1e-13)


def test_traced_calls_give_the_same(monkeypatch):
    """torch.compile takes the path by features."""
    arguments = draw(100)
    output = attend(window_tail_attention, arguments, window=(8, None))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr("hf_linear_attn.ops.window.tail.causal_taylor_window_attention", None)
    torch.testing.assert_close(attend(window_tail_attention, arguments, window=(8, None)), output)


def test_maps_that_name_no_parameters_train():
    q, k, v, q_weight, q_slope, k_weight, k_slope, factor = arguments = draw(90)
    expected = results(window_tail_attention, arguments, window=(8, None))
    maps = (TaylorMap(lambda x, p=p: project(x, *p)) for p in ((q_weight, q_slope), (k_weight, k_slope)))
    given = {"left": 8, "right": 0, "is_causal": True, "scaling": SCALING, "window_log_factor": factor}
    output, _ = window_tail_attention(q, k, v, *maps, **given)
    loss = output.square().sum() + (output * torch.linspace(-1, 1, 4, dtype=F64)).sum()
    for actual, wanted in zip(torch.autograd.grad(loss, arguments), expected[1:], strict=True):
        torch.testing.assert_close(actual, wanted)


def test_maps_without_scales():
    q, k, v, *_ = draw(100)
    maps = [TaylorMap(lambda x: (x[..., :2], None))] * 2
    given = {"left": 8, "right": 0, "is_causal": True, "scaling": SCALING}
    given["window_log_factor"] = torch.zeros(2, dtype=F64)
    found, expected = (f(q, k, v, *maps, **given) for f in (window_tail_attention, naive_window_tail_attention))
    torch.testing.assert_close(found[0], expected)
    gradients = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found[0], expected))
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_training_holds_neither_weights_nor_features():
    """Tokens, the output and a few sums: fewer numbers than a window's weights, or than features."""
    saved, arguments = [], [x.detach().float().requires_grad_() for x in draw(8192, batch=1, dim=8, rank=8)]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        output = attend(window_tail_attention, arguments, window=(63, None))
    output.sum().backward()
    assert sum(saved) < 2 * 8192 * (4 * 8 + 2)


def test_a_second_derivative_is_refused():
    arguments = draw(200)
    output = attend(window_tail_attention, arguments, window=(2, None))
    with pytest.raises(RuntimeError, match="is refused"):
        torch.autograd.grad(output.sum(), arguments[1:2], create_graph=True)
