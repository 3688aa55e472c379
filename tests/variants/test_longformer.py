"""Longformer against a dense float64 formula, and itself in pieces."""

import json

import pytest
import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.text_pairs import CallTokens
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.longformer import LongformerAttention, LongformerConfig

HEADS, DIM, WIDTH = 3, 8, 20


class Layer:
    """The variant behind q, k, v projections of its own, as it stands in a model."""

    def __init__(self, is_causal=False, dtype=torch.float64, trained=True, **options):
        context = LayerContext(0, 2, WIDTH, HEADS, DIM, 512, is_causal)
        self.is_causal = is_causal
        self.module = LongformerAttention(LongformerConfig(**options), context).to(dtype)
        generator = torch.Generator().manual_seed(0)
        self.weights = [
            (
                torch.randn(HEADS * DIM, WIDTH, generator=generator).to(dtype) * 0.5,
                torch.randn(HEADS * DIM, generator=generator).to(dtype),
            )
            for _ in range(3)
        ]
        self.module.load_projections(*self.weights)
        if trained:  # global projections that differ from the checkpoint's
            with torch.no_grad():
                for parameter in self.module.parameters():
                    parameter += torch.randn(parameter.shape, generator=generator).to(dtype) * 0.3

    def qkv(self, hidden):
        return [F.linear(hidden, *w).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for w in self.weights]

    def inputs(self, hidden, padding=None, global_mask=None):
        q, k, v = self.qkv(hidden)
        return AttentionInputs(q, k, v, padding, self.is_causal, DIM**-0.5, hidden, global_mask)

    def __call__(self, hidden, padding=None, global_mask=None):
        return self.module(self.inputs(hidden, padding, global_mask))[0]

    def dense(self, hidden, global_tokens, window, dilation=1):
        """One unpadded sequence `[T, WIDTH]`, every pair of tokens considered on its own."""
        q, k, v = self.qkv(hidden[None])
        m = self.module
        if global_tokens:
            gq, gk, gv = (self.split(f(hidden[None])) for f in (m.query_global, m.key_global, m.value_global))
        steps = dilation if isinstance(dilation, tuple) else (dilation,) * HEADS
        T = hidden.shape[0]
        out = torch.zeros(HEADS, T, DIM, dtype=hidden.dtype)
        for h in range(HEADS):
            for i in range(T):
                past = range(i + 1) if self.is_causal else range(T)
                if i in global_tokens:
                    keys, query, key, value = list(past), gq, gk, gv
                else:
                    reach = (window - 1) * steps[h] if self.is_causal else window // 2 * steps[h]
                    near = [j for j in past if abs(i - j) <= reach and (i - j) % steps[h] == 0]
                    keys = sorted({*near, *(j for j in past if j in global_tokens)})
                    query, key, value = q, k, v
                weights = (key[0, h, keys] @ query[0, h, i] * DIM**-0.5).softmax(0)
                out[h, i] = weights @ value[0, h, keys]
        return out

    @staticmethod
    def split(x):
        return x.unflatten(-1, (HEADS, DIM)).transpose(1, 2)


def draw_hidden(batch, length, seed=1, dtype=torch.float64):
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def padding_of(kind, batch, length):
    places = torch.arange(length).expand(batch, -1)
    number = torch.arange(batch)[:, None] * 3 + 2  # padded tokens per row
    if kind == "left":
        return places >= number
    if kind == "right":
        return places < length - number
    return (places + torch.arange(batch)[:, None]) % 4 != 1  # interior


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("length", [1, 7, 36])
@pytest.mark.parametrize(("window", "dilation"), [(2, 1), (6, 1), (4, 3), (4, (1, 2, 5)), (80, 1)])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_equals_the_dense_formula(is_causal, length, window, dilation, count):
    layer = Layer(is_causal, window_size=window, dilation=dilation, num_global_tokens=count)
    hidden = draw_hidden(2, length)
    out = layer(hidden)
    for b in range(2):
        torch.testing.assert_close(out[b], layer.dense(hidden[b], set(range(count)), window, dilation))


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
@pytest.mark.parametrize("dilation", [1, (1, 2, 3)])
@pytest.mark.parametrize("per_call", [False, True])
@pytest.mark.parametrize("poison", [1e9, float("inf")])
def test_poisoned_padding_and_global_masks_equal_the_dense_formula(is_causal, kind, dilation, per_call, poison):
    layer = Layer(is_causal, window_size=4, dilation=dilation, num_global_tokens=2)
    hidden = draw_hidden(3, 40)
    padding = None if kind is None else padding_of(kind, 3, 40)
    mask = None
    if per_call:
        mask = torch.zeros(3, 40, dtype=torch.bool)
        mask[0, [5, 13, 22]] = mask[1, 8:20] = True  # 3, 12 (more than channels per head) and no global tokens
    inputs = layer.inputs(hidden, padding, mask)
    if padding is not None:
        for x in (inputs.query, inputs.key, inputs.value):
            x.transpose(1, 2)[~padding] = poison
        inputs.hidden_states = hidden.masked_fill(~padding[..., None], poison)
    out = layer.module(inputs)[0]
    for b in range(3):
        real = torch.arange(40) if padding is None else padding[b].nonzero()[:, 0]
        tokens = set(range(2)) if mask is None else set(mask[b][real].nonzero()[:, 0].tolist())
        expected = layer.dense(hidden[b, real], tokens, 4, dilation)
        torch.testing.assert_close(out[b][:, real], expected)
        if padding is not None:
            assert (out[b][:, ~padding[b]] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("length", [1, 7, 36, 65, 130])
def test_covering_window_with_copied_globals_is_softmax(is_causal, length):
    options = get_variant("longformer").exact_limit(length, is_causal)
    for count in (None, 2):
        layer = Layer(is_causal, torch.float32, trained=False, num_global_tokens=count, **options)
        inputs = layer.inputs(draw_hidden(2, length, dtype=torch.float32))
        expected = F.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, is_causal=is_causal)
        torch.testing.assert_close(layer.module(inputs)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("count", [None, 1, 4])
@pytest.mark.parametrize("dilation", [1, 2, (3, 1, 2)])
@pytest.mark.parametrize("splits", [[1] * 24, [24], [1, 1, 22], [9, 15], [13, 1, 10], [3, 7, 0, 14]], ids=str)
@pytest.mark.parametrize("kind", [None, "left", "interior"])
def test_decoding_in_pieces_equals_one_call(count, dilation, splits, kind):
    layer = Layer(True, window_size=4, dilation=dilation, num_global_tokens=count)
    hidden = draw_hidden(3, 24)
    padding = None if kind is None else padding_of(kind, 3, 24)
    expected = layer(hidden, padding)
    state = layer.module.init_state(3, torch.float64, torch.device("cpu"))
    shapes = {name: x.shape for name, x in state.items()}
    outputs = []
    for h, p in zip(hidden.split(splits, 1), padding.split(splits, 1) if kind else [None] * 24, strict=False):
        if h.shape[1]:
            out, state = layer.module(layer.inputs(h, p), state)
            outputs.append(out)
            assert {name: x.shape for name, x in state.items()} == shapes  # bounded, whatever was read
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_fewer_queries_than_keys_are_the_last_ones(is_causal):
    layer = Layer(is_causal, window_size=4, num_global_tokens=2)
    hidden = draw_hidden(2, 30)
    full, inputs = layer(hidden), layer.inputs(hidden)
    inputs.query, inputs.hidden_states = inputs.query[:, :, -11:], hidden[:, -11:]
    torch.testing.assert_close(layer.module(inputs)[0], full[:, :, -11:])
    inputs.query, inputs.hidden_states = layer.qkv(hidden)[0][:, :, 1:], hidden[:, 1:]
    with pytest.raises(ValueError, match="hidden states of all 30 keys"):
        layer.module(inputs)


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_every_parameter_has_the_gradient_of_the_formula(is_causal):
    layer = Layer(is_causal, window_size=4, num_global_tokens=2)
    hidden = draw_hidden(1, 12).requires_grad_()
    names, parameters = zip(*layer.module.named_parameters(), strict=True)
    assert {name.split(".")[0] for name in names} == {"query_global", "key_global", "value_global"}
    weights = draw_hidden(HEADS, 12, seed=3)[..., :DIM]
    ours = torch.autograd.grad((layer(hidden)[0] * weights).sum(), (hidden, *parameters))
    theirs = torch.autograd.grad((layer.dense(hidden[0], {0, 1}, 4) * weights).sum(), (hidden, *parameters))
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)


def test_padding_gives_finite_gradients():
    layer = Layer(window_size=4)
    inputs = layer.inputs(draw_hidden(2, 20), torch.arange(20) < torch.tensor([[0], [9]]))  # row 0 is all padding
    tensors = [x.detach().masked_fill(torch.tensor(False), 0).requires_grad_() for x in layer.qkv(draw_hidden(2, 20))]
    inputs.query, inputs.key, inputs.value = tensors
    out = layer.module(inputs)[0]
    assert (out[0] == 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in [*tensors, *layer.module.parameters()])


def test_outputs_do_not_depend_on_batch_mates():
    layer = Layer(window_size=4)
    hidden, padding = draw_hidden(3, 30), padding_of("left", 3, 30)
    mask = torch.zeros(3, 30, dtype=torch.bool)
    mask[:, 15] = mask[2, 20:28] = True
    for m in (None, mask):
        together = layer(hidden, padding, m)
        for b in range(3):
            alone = layer(hidden[b : b + 1], padding[b : b + 1], None if m is None else m[b : b + 1])
            torch.testing.assert_close(together[b : b + 1], alone)


@pytest.mark.parametrize("kind", [None, "left", "right", "interior"])
def test_tokens_of_a_task_equal_the_dense_formula(kind):
    """What the head chooses, worked out here from the lengths of the texts."""
    layer, hidden = Layer(window_size=4), draw_hidden(3, 40)
    padding = torch.ones(3, 40, dtype=torch.bool) if kind is None else padding_of(kind, 3, 40)
    ids, lengths = torch.full((3, 40), 7), (3, 1, 9)
    for b, length in enumerate(lengths):
        real = padding[b].nonzero()[:, 0]
        ids[b, real[[length, length + 1, -1]]] = 2
    call = CallTokens(padding, None, ids, None, 2)
    for task, rule in (("question-answering", range), ("multiple-choice", None)):
        mask = layer.module.global_choice(task).mark(call)
        out = layer(hidden, None if kind is None else padding, mask)
        for b, length in enumerate(lengths):
            real = padding[b].nonzero()[:, 0]
            tokens = set(rule(length)) if rule else set(range(length + 2, len(real)))
            torch.testing.assert_close(out[b][:, real], layer.dense(hidden[b, real], tokens, 4))
    assert layer.module.global_choice(None) is None
    assert Layer(window_size=4, num_global_tokens=1).module.global_choice("question-answering") is None
    assert Layer(True, window_size=4).module.global_choice("question-answering") is None


@pytest.mark.parametrize("is_causal", [False, True], ids=["encoder", "decoder"])
def test_compiles_into_one_graph(is_causal):
    layer = Layer(is_causal, torch.float32, window_size=8, num_global_tokens=1)
    compiled = torch.compile(layer.module, fullgraph=True, backend="aot_eager")
    hidden = draw_hidden(2, 65, dtype=torch.float32)
    for padding in (None, padding_of("left", 2, 65)):
        inputs = layer.inputs(hidden, padding)
        torch.testing.assert_close(compiled(inputs)[0], layer.module(inputs)[0])


def test_window_may_differ_by_layer_and_options_survive_json():
    config = LongformerConfig.from_dict(json.loads(json.dumps({"window_size": [4, 8], "dilation": [1, 2, 1]})))
    assert LongformerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    windows = [LongformerAttention(config, LayerContext(i, 2, 24, 3, 8, 64, False)).window_size for i in range(2)]
    assert windows == [4, 8]


def test_start_is_deterministic_and_survives_the_meta_device():
    context = LayerContext(1, 2, WIDTH, HEADS, DIM, 64, is_causal=False)
    first = LongformerAttention(LongformerConfig(), context)
    with torch.device("meta"):
        second = LongformerAttention(LongformerConfig(), context)
    second = second.to_empty(device="cpu")
    second.reset_parameters()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert first.query_global.weight.std() > 0.01


@pytest.mark.parametrize(
    ("options", "is_causal", "message"),
    [
        ({"window_size": 0}, False, "window_size=0; allowed: an integer of at least 1"),
        ({"window_size": 7}, False, "window_size must be even on an encoder .*got 7"),
        ({"window_size": [4, 4, 4]}, True, "names 3 layers, the model has 2"),
        ({"dilation": [1, 2]}, True, "names 2 heads, the layer has 3"),
        ({"dilation": "2"}, True, "dilation='2'; allowed: an integer of at least 1, or a list"),
        ({"num_global_tokens": -1}, True, "num_global_tokens=-1; allowed: an integer of at least 0, or None"),
        ({"global_token_ids": -1}, False, "global_token_ids=-1; allowed: an integer of at least 0, or a list with one"),
        ({"global_token_ids": [3, "4"]}, False, "global_token_ids=.*allowed: an integer"),
        ({"global_token_ids": []}, False, "global_token_ids=.*allowed: an integer"),
        ({"global_token_ids": 3, "num_global_tokens": 2}, False, "num_global_tokens=2; allowed: None beside"),
        ({"global_token_ids": 3}, True, "global_token_ids serves encoders"),
        ({"window": 4}, True, "Unknown option.*'window'.*Allowed: window_size"),
    ],
)
def test_bad_options_are_named(options, is_causal, message):
    with pytest.raises(ValueError, match=message):
        LongformerAttention(LongformerConfig.from_dict(options), LayerContext(0, 2, WIDTH, HEADS, DIM, 64, is_causal))


def test_calls_it_cannot_honor_are_refused():
    hidden = draw_hidden(1, 6)
    mask = torch.ones(1, 6, dtype=torch.bool)
    layer = Layer(True, window_size=4, num_global_tokens=1)
    state = layer.module.init_state(1, torch.float64, torch.device("cpu"))
    with pytest.raises(ValueError, match="use_cache=False"):
        layer.module(layer.inputs(hidden, None, mask), state)
    with pytest.raises(ValueError, match="num_global_tokens >= 1"):
        Layer(True, window_size=4)(hidden, None, mask)
    with pytest.raises(ValueError, match=r"global_mask must have shape \(1, 6\)"):
        layer(hidden, None, mask[:, :3])
    inputs = layer.inputs(hidden)
    inputs.hidden_states = None
    with pytest.raises(ValueError, match="need hidden_states"):
        layer.module(inputs)
    inputs.is_causal = False
    with pytest.raises(ValueError, match="is_causal=True, called with False"):
        layer.module(inputs)


@pytest.mark.parametrize("options", [{}, {"num_global_tokens": 12}], ids=["folded", "projected"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_adapters_on_the_global_projections_take_part(is_causal, options):
    """LoRA wraps a layer and leaves its weight as it was: reading the weight would pass the adapter by."""
    from peft import LoraConfig, inject_adapter_in_model

    layer = Layer(is_causal, window_size=4, **{"num_global_tokens": 1, **options})
    hidden = draw_hidden(2, 20)
    plain = layer(hidden)
    targets = ["query_global", "key_global", "value_global"]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), layer.module)
    adapted = layer(hidden)
    adapted.square().sum().backward()
    adapters = {name: p for name, p in layer.module.named_parameters() if "lora_" in name}
    # The query of a single first token of a decoder has one key to see, so that its logits do not matter.
    matter = [name for name in adapters if "value" in name or not is_causal or options]
    assert all(adapters[name].grad.abs().max() > 1e-4 for name in matter)
    assert (adapted - plain).abs().max() > 1e-2
    for name in targets:
        getattr(layer.module, name).merge()
    for name in targets:  # the merged weights, in plain layers
        setattr(layer.module, name, getattr(layer.module, name).get_base_layer())
    torch.testing.assert_close(layer(hidden), adapted)


@pytest.mark.parametrize("count", [1, 3])
def test_first_tokens_of_rotary_decoders_are_global_without_projections(count):
    """Every row sees its window and the first tokens; those see each other, through the layer's own q, k and v."""
    context = LayerContext(0, 2, WIDTH, HEADS, DIM, 512, True, rotary=True)
    assert LongformerAttention(LongformerConfig(), context).num_global_tokens == 1
    layer = LongformerAttention(LongformerConfig(window_size=4, num_global_tokens=count), context)
    assert list(layer.parameters()) == []
    q, k, v = torch.randn(3, 2, HEADS, 23, DIM, dtype=torch.float64)
    place = torch.arange(23)
    distance = place[:, None] - place
    allowed = (distance >= 0) & ((distance < 4) | (place < count))
    expected = (q @ k.mT * 0.3).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    out, _ = layer(AttentionInputs(q, k, v, is_causal=True, scaling=0.3))
    torch.testing.assert_close(out, expected)
    state, outputs = layer.init_state(2, torch.float64, q.device), []
    assert set(state) == {"key", "value", "count", "global_key", "global_value"}
    for rows in place.split([1, 1, 9, 12]):
        call = AttentionInputs(q[:, :, rows], k[:, :, rows], v[:, :, rows], is_causal=True, scaling=0.3)
        part, state = layer(call, state)
        outputs.append(part)
    torch.testing.assert_close(torch.cat(outputs, 2), expected)


def test_rotary_layers_take_no_global_mask():
    layer = LongformerAttention(LongformerConfig(), LayerContext(0, 2, WIDTH, HEADS, DIM, 512, True, rotary=True))
    q = torch.randn(1, HEADS, 5, DIM)
    mask = torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"global_mask needs projections.*rotary"):
        layer(AttentionInputs(q, q, q, is_causal=True, global_mask=mask))
    encoder = LayerContext(0, 2, WIDTH, HEADS, DIM, 512, False, rotary=True)
    with pytest.raises(ValueError, match=r"num_global_tokens=1.*rotary"):
        LongformerAttention(LongformerConfig(num_global_tokens=1), encoder)


def test_global_rows_have_the_same_bits_wherever_the_weights_lie_in_memory():
    """Weights of a file that is mapped into memory lie at any multiple of 8 bytes."""
    context = LayerContext(0, 2, 384, 12, 32, 512, False)
    module = LongformerAttention(LongformerConfig(window_size=8), context).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    hidden = torch.randn(1, 60, 384, generator=generator)
    q, k, v = torch.randn(3, 1, 12, 60, 32, generator=generator)
    inputs = AttentionInputs(q, k, v, scaling=32**-0.5, hidden_states=hidden)
    expected = module(inputs)[0]
    for offset in (2, 4, 6):  # numbers of 4 bytes
        for parameter in module.parameters():
            room = torch.empty(parameter.numel() + 32)
            start = -room.data_ptr() // 4 % 16 + offset
            place = room[start : start + parameter.numel()].view(parameter.shape)
            parameter.data = place.copy_(parameter.data)
        assert torch.equal(module(inputs)[0], expected)
