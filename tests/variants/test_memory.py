"""The three forms of `memory` against dense float64 evaluations of their formulas, and their exact limits."""

import pytest
import torch

from hf_linear_attn.ops.exact import scan as recomputed_scan
from hf_linear_attn.testing.tools import AllocationRecorder
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.memory import MemoryAttention, MemoryConfig

SCALING = 0.3
HEADS, DIM = 3, 8
LENGTHS = (1, 7, 16, 36, 65)


def build(causal=True, **options):
    context = LayerContext(0, 6, HEADS * DIM, HEADS, DIM, 512, causal)
    return MemoryAttention(MemoryConfig(**options), context)


def draw(length, *, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, HEADS, length, DIM, generator=g, dtype=torch.float64).to(dtype).unbind(0)


def attend(module, q, k, v, padding=None, state=None):
    return module(AttentionInputs(q, k, v, padding, module.context.is_causal, SCALING), state)


def softmax(q, k, v, allowed):
    return (q @ k.mT * SCALING).masked_fill(~allowed, -torch.inf).softmax(-1) @ v


def sees(length, segment_size, mem_length, causal=True):
    """Row i sees its own segment, up to itself where causal, and `mem_length` tokens before, elsewhere also behind."""
    row, column = torch.arange(length)[:, None], torch.arange(length)
    begin = row // segment_size * segment_size
    end = row + 1 if causal else begin + segment_size + mem_length
    return (column < end) & (column >= begin - mem_length)


def infini(module, q, k, v):
    """Query by query: local softmax, and a read from the sums over all segments before, or all but, the query's own."""
    size, causal = module.config.segment_size, module.context.is_causal
    local = softmax(q, k, v, sees(q.shape[2], size, 0, causal))
    phi_q, phi_k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    if module.config.variance_reducer:
        phi_k = phi_k * (SCALING * torch.einsum("hd,bhtd->bht", module.query_mean.double(), k)).exp()[..., None]
    gate = module.beta.double().sigmoid()[:, None]
    rows = []
    for i in range(q.shape[2]):
        segment = torch.arange(q.shape[2]) // size
        held = segment < i // size if causal else segment != i // size
        if not held.any():
            rows.append(local[:, :, i])
            continue
        m, z = phi_k[:, :, held].mT @ v[:, :, held], phi_k[:, :, held].sum(2)
        read = (phi_q[:, :, i, None] @ m)[:, :, 0] / (phi_q[:, :, i] * z).sum(-1, keepdim=True)
        rows.append(gate * read + (1 - gate) * local[:, :, i])
    return torch.stack(rows, 2)


SIDES = pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])


@SIDES
@pytest.mark.parametrize("reduced", [False, True], ids=["published", "reducer"])
@pytest.mark.parametrize("segment_size", [1, 5, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_infini_is_its_formula(length, segment_size, reduced, causal):
    """With the reducer, keys in memory weigh exp(scaling * a . k), up to a constant that cancels."""
    module = build(causal, form="infini", segment_size=segment_size, variance_reducer=reduced).double()
    if reduced:
        module.query_mean.normal_(generator=torch.Generator().manual_seed(2))
        module.key_peak.fill_(3.0)
    with torch.no_grad():
        module.beta.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    q, k, v = draw(length)
    torch.testing.assert_close(attend(module, q, k, v)[0], infini(module, q, k, v))


@SIDES
@pytest.mark.parametrize(("segment_size", "mem_length"), [(1, 3), (8, 0), (8, 5), (8, 20), (5, 5)])
@pytest.mark.parametrize("length", LENGTHS)
def test_transformer_xl_sees_its_segment_and_what_is_around_it(length, segment_size, mem_length, causal):
    module = build(causal, form="transformer_xl", segment_size=segment_size, mem_length=mem_length)
    q, k, v = draw(length)
    expected = softmax(q, k, v, sees(length, segment_size, mem_length, causal))
    torch.testing.assert_close(attend(module, q, k, v)[0], expected)


@pytest.mark.parametrize("chunk_size", [16, None])
@SIDES
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_softmax_attention(length, causal, chunk_size):
    q, k, v = draw(length, dtype=torch.float32)
    allowed = torch.ones(length, length, dtype=torch.bool)
    output = attend(build(causal, chunk_size=chunk_size), q, k, v)[0]
    expected = softmax(q, k, v, allowed.tril() if causal else allowed)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"form": "infini", "segment_size": 65},
        {"form": "transformer_xl", "segment_size": 8, "mem_length": 65},
        {"form": "transformer_xl", "segment_size": 65, "mem_length": 0},
    ],
    ids=str,
)
@SIDES
def test_the_memories_exact_limits(options, causal):
    """Infini while memory is empty, whatever the gate; Transformer-XL when its memory reaches all tokens."""
    module = build(causal, **options)
    for parameter in module.parameters():
        parameter.data.fill_(3.0)
    q, k, v = draw(65, dtype=torch.float32)
    allowed = torch.ones(65, 65, dtype=torch.bool)
    expected = softmax(q, k, v, allowed.tril() if causal else allowed)
    torch.testing.assert_close(attend(module, q, k, v)[0], expected, atol=1e-5, rtol=1e-5)


FORMS = [
    {"chunk_size": 7},
    {"form": "infini", "segment_size": 7},
    {"form": "transformer_xl", "segment_size": 7, "mem_length": 4},
]


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("split", [(1,) * 40, (6, 1, 1, 6, 26), (7, 7, 26), (20, 20), (39, 1)], ids=str)
def test_any_split_is_the_whole_with_padding_of_any_kind(split, options):
    """Segments are counted in real tokens: rows of a batch finish theirs at different calls."""
    module = build(**options).double()
    for parameter in module.parameters():
        parameter.data.fill_(0.5)
    q, k, v = draw(40)
    padding = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    padding[0, :9] = False
    state, outputs = module.init_state(2, torch.float64, q.device), []
    for part in torch.arange(40).split(split):
        output, state = attend(module, *(x[:, :, part] for x in (q, k, v)), padding[:, part], state)
        outputs.append(output)
    decoded = torch.cat(outputs, 2)
    for row in range(2):
        real = padding[row]
        alone = attend(module, *(x[row : row + 1, :, real] for x in (q, k, v)))[0]
        torch.testing.assert_close(decoded[row : row + 1, :, real], alone)


@pytest.mark.parametrize("options", FORMS[1:], ids=str)
def test_an_encoder_reads_each_row_of_a_batch_as_if_alone(options):
    """Segments are counted in real tokens, wherever the padding; a row of one segment has no memory to read."""
    module = build(False, **options).double()
    for parameter in module.parameters():
        parameter.data.fill_(0.5)
    q, k, v = draw(40)
    padding = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    padding[0, 7:] = False
    found = attend(module, q, k, v, padding)[0]
    for row in range(2):
        real = padding[row]
        alone = attend(module, *(x[row : row + 1, :, real] for x in (q, k, v)))[0]
        torch.testing.assert_close(found[row : row + 1, :, real], alone)


def test_what_a_segment_does_not_hold_is_not_what_is_left_of_a_difference():
    """One segment's keys weigh e^25 times the others': its own queries read the others all the same."""
    module = build(False, form="infini", segment_size=8)
    module.beta.data.fill_(20.0)
    module.query_mean.fill_(1.0)
    q, k, v = draw(24, dtype=torch.float32)
    k[:, :, 8:16] += 25 / SCALING / DIM
    exact = infini(module, *(x.double() for x in (q, k, v)))
    torch.testing.assert_close(attend(module, q, k, v)[0].double(), exact, atol=1e-5, rtol=1e-5)


def test_transformer_xl_stops_the_gradient_around_segments_of_encoders():
    module = build(False, form="transformer_xl", segment_size=8, mem_length=8)
    q, k, v = (x.requires_grad_() for x in draw(24))
    attend(module, q, k, v)[0][:, :, 8:16].sum().backward()
    for grad in (k.grad, v.grad):
        assert not grad[:, :, :8].any()
        assert not grad[:, :, 16:].any()
        assert grad[:, :, 8:16].any()


def test_transformer_xl_stops_the_gradient_at_segments_before():
    module = build(form="transformer_xl", segment_size=8, mem_length=8)
    q, k, v = (x.requires_grad_() for x in draw(16))
    attend(module, q, k, v)[0][:, :, 8:].sum().backward()
    assert not k.grad[:, :, :8].any()
    assert not v.grad[:, :, :8].any()
    assert k.grad[:, :, 8:].any()


def test_infini_learns_through_its_memory():
    module = build(form="infini", segment_size=8).double()
    q, k, v = (x.requires_grad_() for x in draw(16))
    attend(module, q, k, v)[0][:, :, 8:].sum().backward()
    assert v.grad[:, :, :8].any()
    assert module.beta.grad.all()


@SIDES
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("length", [16, 41])
def test_infini_is_the_same_in_pieces(length, padded, causal, monkeypatch):
    """Pieces of one segment or all segments at once: the same output and gradients."""
    padding = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6 if padded else None
    found = []
    for elements in (1, 1 << 20):
        monkeypatch.setattr(recomputed_scan, "PIECE_ELEMENTS", elements)
        module = build(causal, form="infini", segment_size=5).double()
        module.query_mean.fill_(0.3)
        module.beta.data.fill_(0.5)
        q, k, v = (x.requires_grad_() for x in draw(length))
        output = attend(module, q, k, v, padding)[0]
        found.append((output, *torch.autograd.grad(output.sin().sum(), [q, k, v, module.beta])))
    torch.testing.assert_close(*found)


@SIDES
def test_gates_start_almost_closed_and_calibration_opens_those_that_help(causal):
    g = torch.Generator().manual_seed(0)
    q, k = 0.1 * torch.randn(2, 2, HEADS, 64, DIM, generator=g)  # attention is almost uniform: far segments count
    v = torch.randn(2, HEADS, 64, DIM, generator=g)
    module = build(causal, form="infini", segment_size=16)
    assert (module.beta == -8).all()
    allowed = torch.ones(64, 64, dtype=torch.bool)
    exact = softmax(q, k, v, allowed.tril() if causal else allowed)

    def errors():
        return (attend(module, q, k, v)[0] - exact).square().sum((0, 2, 3))

    before = errors()
    module.calibrate([AttentionInputs(q, k, v, None, causal, SCALING)])
    assert (errors() < 0.7 * before).all()
    module.reset_parameters()
    short = [x[:, :, :16] for x in (q, k, v)]  # memory stays empty: nothing to choose by
    module.calibrate([AttentionInputs(*short, None, causal, SCALING)])
    assert (module.beta == -8).all()


def test_calibrated_memory_keeps_a_token_that_all_queries_attend_to():
    """A first token that later segments no longer see: the reducer puts it into memory at its true weight."""
    g = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, HEADS, 96, DIM, generator=g)
    q = q + 2
    k[:, :, 0] = 3.0
    exact = softmax(q, k, v, torch.ones(96, 96, dtype=torch.bool).tril())
    errors = {}
    for reduced in (False, True):
        module = build(form="infini", segment_size=16, variance_reducer=reduced)
        module.calibrate([AttentionInputs(q, k, v, None, True, SCALING)])
        errors[reduced] = (attend(module, q, k, v)[0] - exact).square().sum((0, 2, 3))
    assert (errors[True] < 0.3 * errors[False]).all()


def test_key_weights_in_memory_are_bounded():
    """Keys far above or below those of calibration overflow nothing and leave no empty denominator."""
    module = build(form="infini", segment_size=8)
    q, k, v = draw(32, dtype=torch.float32)
    for sign in (1.0, -1.0):
        module.query_mean.fill_(sign)
        output, state = attend(module, q, 1e4 * k.abs(), v, state=module.init_state(2, torch.float32, q.device))
        assert output.isfinite().all()
        assert state["memory"][..., -1].sum(-1).all()


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"form": "infini", "segment_size": 6}, 2 * DIM * (DIM + 1) + 2 * 5 * DIM),
        ({"form": "transformer_xl", "segment_size": 6, "mem_length": 10}, 2 * 15 * DIM),
    ],
    ids=["infini", "transformer_xl"],
)
def test_decode_state_stays_the_same_size(options, numbers):
    module = build(**options)
    state = module.init_state(2, torch.float32, torch.device("cpu"))
    for length in (1, 30, 5):
        assert sum(x[0, 0].numel() for name, x in state.items() if name != "count") == numbers
        _, state = attend(module, *draw(length, dtype=torch.float32), state=state)


def test_a_decode_step_touches_one_segment_only():
    """However long the past: no tensor of a step is larger than the state or the segment's keys."""
    module = build(form="infini", segment_size=16)
    _, state = attend(module, *draw(200, dtype=torch.float32), state=module.init_state(2, torch.float32, "cpu"))
    with AllocationRecorder() as recorder, torch.no_grad():
        attend(module, *draw(1, dtype=torch.float32), state=state)
    assert max(size for _, size in recorder.seen) <= 2 * HEADS * 16 * max(DIM + 1, 16)


def test_chunked_training_holds_no_square():
    module = build(False)
    q, k, v = (x[:1].requires_grad_() for x in draw(1024, dtype=torch.float32))
    with AllocationRecorder() as recorder:
        attend(module, q, k, v)[0].sum().backward()
    assert max(size for _, size in recorder.seen) <= HEADS * 256 * 256


def test_encoders_with_a_memory_hold_no_square():
    """Training on 1,024 tokens: no tensor is larger than the segments' keys, or the sums of all segments."""
    for options in ({"form": "infini"}, {"form": "transformer_xl", "mem_length": 32}):
        module = build(False, segment_size=32, **options)
        q, k, v = (x[:1].requires_grad_() for x in draw(1024, dtype=torch.float32))
        with AllocationRecorder() as recorder:
            attend(module, q, k, v)[0].sum().backward()
        assert max(size for _, size in recorder.seen) <= HEADS * 1024 * 3 * 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "xl"}, "form='xl'; allowed: chunked, infini, transformer_xl"),
        ({"segment_size": 0}, "segment_size=0; allowed: an integer of at least 1"),
        ({"mem_length": -1}, "mem_length=-1; allowed: an integer of at least 0"),
        ({"chunk_size": True}, "chunk_size=True"),
        ({"variance_reducer": 0}, "variance_reducer=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MemoryConfig(**options)


def test_bad_calls_say_so():
    q, k, v = draw(5)
    module = build()
    with pytest.raises(ValueError, match="is_causal=True, called with False"):
        module(AttentionInputs(q, k, v, None, False, SCALING))
    with pytest.raises(ValueError, match="got 2 and 5"):
        attend(module, q[:, :, :2], k, v, state=module.init_state(2, torch.float64, q.device))
    with pytest.raises(ValueError, match="Tq=5 and Tk=2"):
        attend(module, q, k[:, :, :2], v[:, :, :2])
    with pytest.raises(ValueError, match="form='infini' needs Tq <= Tk, got Tq=5 and Tk=2"):
        attend(build(False, form="infini"), q, k[:, :, :2], v[:, :, :2])
