"""`hedgehog` against its dense float64 formula, its two calibrated starts and the loss of its paper."""

import pytest
import torch

from hf_linear_attn.ops.features import softmax_map as maps
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.hedgehog import HedgehogAttention, HedgehogConfig

SCALING = 0.35


def build(causal=False, *, heads=3, dim=8, layer_idx=0, **options):
    context = LayerContext(layer_idx, 6, heads * dim, heads, dim, 512, causal)
    return HedgehogAttention(HedgehogConfig(**options), context).double()


def draw(length, *, batch=2, heads=3, dim=8, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(3, batch, heads, length, dim, generator=g, dtype=torch.float64)).unbind(0)


def attend(module, q, k, v, padding=None, causal=False):
    return module(AttentionInputs(q, k, v, padding, causal, SCALING))[0]


def dense(phi_q, phi_k, v, causal):
    scores = phi_q @ phi_k.mT
    scores = scores.tril() if causal else scores
    return scores @ v / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_starts_as_published(causal):
    q, k, v = draw(90)

    def phi(x):
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    torch.testing.assert_close(attend(build(causal), q, k, v, causal=causal), dense(phi(q), phi(k), v, causal))


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_each_form_is_its_formula(causal):
    q, k, v = draw(90)
    module = build(causal, num_features=6)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim)))
    module.form.copy_(torch.tensor([maps.PUBLISHED, maps.KEY_CENTROIDS, maps.QUERY_CENTROIDS]))
    u_q = q @ module.query_weight.mT + module.query_bias[:, None]
    u_k = k @ module.key_weight.mT + module.key_bias[:, None]

    def halves(u):
        return torch.cat([u[..., :3].softmax(-1), u[..., 3:].softmax(-1)], -1)

    pairs = [(halves(u_q), halves(u_k)), (u_q.exp(), u_k.softmax(-1)), (u_q.softmax(-1), u_k.exp())]
    expected = torch.stack([dense(a[:, h], b[:, h], v[:, h], causal) for h, (a, b) in enumerate(pairs)], 1)
    torch.testing.assert_close(attend(module, q, k, v, causal=causal), expected)


def test_num_features_cuts_or_extends_the_identity():
    assert torch.equal(build(num_features=6).query_weight[0, :3], torch.eye(8)[:3].double())
    weight = build(num_features=40).key_weight
    assert torch.equal(weight[:, :8], torch.eye(8).double().expand(3, -1, -1))
    assert torch.equal(weight[:, 20:], -weight[:, :20])
    torch.testing.assert_close(weight.norm(dim=-1), torch.ones(3, 40, dtype=torch.float64))
    assert len({tuple(row) for row in weight[0].tolist()}) == 40
    assert not torch.equal(build(num_features=40, layer_idx=1).key_weight, weight)


def exact(q, k, v, padding, causal):
    mask = padding[:, None, None, :] & (torch.ones(q.shape[2], q.shape[2]).tril().bool() if causal else True)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALING)


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
def test_calibration_is_never_worse_in_any_head_and_better_on_clusters(causal):
    q, k, v = draw(160, batch=3)
    centers = 3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    k = 0.2 * k
    k[:, 0] += centers[torch.arange(160) % 5]  # head 0: five kinds of keys
    q[:, 1], k[:, 1] = 0.2 * q[:, 1] + centers[torch.arange(160) % 5], 5 * k[:, 1]  # head 1: five kinds of queries
    padding = torch.ones(3, 160, dtype=torch.bool)
    padding[0, 120:] = False
    padding[1, :30] = False
    poisoned = [x.masked_fill(~padding[:, None, :, None], 1e9) for x in (q, k, v)]
    module, want = build(causal), exact(q, k, v, padding, causal)

    def errors():
        difference = (attend(module, q, k, v, padding, causal) - want) * padding[:, None, :, None]
        return difference.square().sum((0, 2, 3))

    before = errors()
    module.calibrate([AttentionInputs(*poisoned, padding, causal, SCALING)])
    after = errors()
    assert (after <= before * 1.0001).all()
    assert module.form[0] != maps.PUBLISHED
    assert module.form[1] != maps.PUBLISHED
    assert (after[:2] < 0.3 * before[:2]).all()


def test_centroids_of_few_kinds_of_keys_are_exact():
    """With a centroid on every key, the estimate is softmax attention itself."""
    q, k, v = draw(60, heads=1)
    k = k[:, :, :1] + 4.0 * torch.eye(8, dtype=torch.float64)[torch.arange(60) % 4]
    k = k[:1].expand(2, -1, -1, -1)
    module = build(heads=1)
    module.calibrate([AttentionInputs(q, k, v, None, False, SCALING)])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=SCALING)
    torch.testing.assert_close(attend(module, q, k, v), want, atol=1e-3, rtol=1e-3)


def test_the_loss_is_the_papers_cross_entropy():
    q, k, v = draw(50)
    padding = torch.ones(2, 50, dtype=torch.bool)
    padding[0, 40:] = False
    for causal in (False, True):
        module = build(causal)
        inputs = AttentionInputs(q.masked_fill(~padding[:, None, :, None], 1e9), k, v, padding, causal, SCALING)
        visible = padding[:, None, None, :] & (torch.ones(50, 50).tril().bool() if causal else True)

        def phi(x):
            return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

        softmax = (q @ k.mT * SCALING).masked_fill(~visible, -torch.inf).softmax(-1)
        linear = (phi(q) @ phi(k).mT).masked_fill(~visible, 0)
        linear = linear / linear.sum(-1, keepdim=True)
        rows = -torch.special.xlogy(softmax, linear).sum(-1)
        expected = rows.transpose(1, 2)[padding].mean()
        torch.testing.assert_close(module.regression_loss(inputs, v), expected)


def test_the_loss_samples_queries_and_trains_every_map():
    q, k, v = draw(1000, batch=1, heads=3)
    module = build()
    shapes = []

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shapes.extend([out.shape] if isinstance(out, torch.Tensor) else [])
            return out

    with Shapes():
        loss = module.regression_loss(AttentionInputs(q, k, v, None, False, SCALING), v)
    assert not [shape for shape in shapes if list(shape).count(1000) > 1]
    loss.backward()
    assert all(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(("value", "allowed"), [(7, "even"), *((x, "at least 2") for x in (0, -2, True, 8.0))])
def test_bad_options_are_named(value, allowed):
    with pytest.raises(ValueError, match=f"num_features={value}; allowed: .*{allowed}"):
        HedgehogConfig(num_features=value)


def test_state_has_the_promised_size():
    state = build(True).init_state(2, torch.float32, "cpu")
    assert state["kv"].shape == (2, 3, 16, 8)
    assert state["z"].shape == (2, 3, 16)
