"""A decode step of linear attention in the kernel against every pair of tokens in float64, for each kind of map.

Without a GPU the kernel is interpreted (float32 and float16 only); tests marked `gpu` run it for real.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the extra [triton] is not installed")

from hf_linear_attn.kernels.linear.step import decode_step
from hf_linear_attn.ops.features.maps import KeyWeights, TokenMap

BATCH, HEADS, DIM, WIDTH, RANK = 2, 3, 20, 40, 5
EARLIER, NEW = 4, 3  # tokens that the state holds, and those of the step
LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def _sides(kind: str) -> tuple[TokenMap, TokenMap, KeyWeights]:
    """Maps of queries and of keys that share nothing, and weights of keys; in float64."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(HEADS, *shape, dtype=torch.float64) * 0.4

    mean = KeyWeights(0.7, draw(DIM))
    if kind == "projected_pairs":
        q_map, k_map = (TokenMap(kind, m, draw(RANK, DIM).mT, bias=draw(RANK)) for m in (0.6, 0.8))
    elif kind == "turned_relu":
        q_map, k_map = (TokenMap(kind, 0.1, center=draw(DIM)) for _ in range(2))
    elif kind == "identity":
        return TokenMap(kind), TokenMap(kind), KeyWeights()
    else:
        q_map, k_map = TokenMap(kind, 0.6), TokenMap(kind, 0.8)
    return q_map, k_map, mean


def _features(x: torch.Tensor, given: TokenMap) -> torch.Tensor:
    """As `TokenMap` defines them, one product after the other."""
    if given.kind == "projected_pairs":
        assert given.weight is not None
        assert given.bias is not None
        u = given.multiplier * (x @ given.weight + given.bias[:, None])
        ones = torch.cat([torch.ones_like(u[..., :1]), u], -1)
        pairs = [(i, j) for i in range(RANK + 1) for j in range(i, RANK + 1)]
        rows = [ones[..., i] * ones[..., j] * (0.5**0.5 if i == j > 0 else 1) for i, j in pairs]
        return torch.stack(rows, -1)
    if given.kind == "turned_relu":
        assert given.center is not None
        positive, angle = (x[..., :-1] - given.center[:, None]).relu(), given.multiplier * x[..., -1:]
        return torch.cat([positive * angle.cos(), positive * angle.sin()], -1)
    if given.kind == "identity":
        return x
    return F.elu(x * given.multiplier) + 1 if given.kind == "elu" else F.relu(x * given.multiplier)


def _tokens(kind: str, *, masked: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """q, k and v in float64 of earlier and new tokens, and which of them are real; the others hold nan."""
    total = EARLIER + NEW
    q, k, v = (torch.randn(BATCH, HEADS, total, n, dtype=torch.float64) for n in (DIM, DIM, WIDTH))
    if kind == "identity":
        q, k = q.abs(), k.abs()
    real = torch.ones(BATCH, total, dtype=torch.bool)
    if masked:
        real[0, 1] = real[0, EARLIER + 1] = real[1, EARLIER] = False
        q, k, v = (torch.where(real[:, None, :, None], x, torch.nan) for x in (q, k, v))
    if kind == "turned_relu":
        rank = torch.arange(total, dtype=torch.float64)[None, None, :, None].expand(BATCH, HEADS, -1, 1)
        q, k = torch.cat([q, rank], -1), torch.cat([k, rank], -1)
    return [q, k, v], real


def _dense(
    given: list[torch.Tensor],
    real: torch.Tensor,
    sides: tuple[TokenMap, TokenMap, KeyWeights],
    log_weight: torch.Tensor | None,
    log_decay: torch.Tensor | None,
    *,
    normalized: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs and log denominators of all tokens, and the true sums over all of them."""
    q_map, k_map, weights = sides
    q, k, v = (torch.where(real[:, None, :, None], x, 0) for x in given)
    a = torch.zeros(BATCH, HEADS, EARLIER + NEW, dtype=torch.float64)
    if log_weight is not None:
        a = a + log_weight
    if weights.mean is not None:
        a = a + weights.scaling * (k[..., :DIM] * weights.mean[:, None]).sum(-1)
    phi_q, phi_k = _features(q, q_map), _features(k, k_map)
    phi_k = phi_k * torch.where(real[:, None], a.exp(), 0)[..., None]
    left = torch.zeros_like(phi_k)
    if log_decay is not None:
        left = left + (log_decay if log_decay.ndim == 4 else log_decay[..., None])
    left = torch.where(real[:, None, :, None], left, 0)
    kv = torch.zeros(BATCH, HEADS, phi_k.shape[-1], WIDTH, dtype=torch.float64)
    z = kv[..., 0]
    outputs, denominators = [], []
    for t in range(EARLIER + NEW):
        kept = left[:, :, t].exp()
        kv = kv * kept[..., None] + phi_k[:, :, t, :, None] * v[:, :, t, None]
        z = z * kept + phi_k[:, :, t]
        below = (phi_q[:, :, t] * z).sum(-1)
        outputs.append((phi_q[:, :, t, None] @ kv)[:, :, 0] / (below[..., None] if normalized else 1))
        denominators.append(below.log())
    return torch.stack(outputs, 2), torch.stack(denominators, 2), kv, z


def _check(
    kind: str, *, masked: bool, decay: str, weighted: bool, normalized: bool, dtype: torch.dtype, device: str = "cpu"
) -> None:
    torch.manual_seed(0)
    sides = _sides(kind)
    if not normalized:
        sides = (*sides[:2], KeyWeights())
    (given, real), total = _tokens(kind, masked=masked), EARLIER + NEW
    given = [x if kind in ("identity", "turned_relu") and i < 2 else x.to(dtype).double() for i, x in enumerate(given)]
    width = _features(given[0], sides[0]).shape[-1]
    log_weight = torch.randn(BATCH, HEADS, total, dtype=torch.float64) * 20 if weighted else None
    shape = {"none": None, "token": (), "feature": (width,)}[decay]
    log_decay = None if shape is None else -torch.rand(BATCH, HEADS, total, *shape, dtype=torch.float64) * 3
    options: dict[str, Any] = {"normalized": normalized}
    wanted = _dense(given, real, sides, log_weight, log_decay, **options)

    def cut(x: torch.Tensor | None, tokens: slice) -> torch.Tensor | None:
        return None if x is None else x[:, :, tokens].float().to(device)

    def side(x: TokenMap) -> TokenMap:
        tensors = {n: y.float().to(device) for n, y in x._asdict().items() if isinstance(y, torch.Tensor)}
        return x._replace(**tensors)

    weights = sides[2]._replace(mean=None if sides[2].mean is None else sides[2].mean.float().to(device))
    state: Any = [torch.zeros(BATCH, HEADS, width, WIDTH), torch.zeros(BATCH, HEADS, width)]
    state = [x.to(device) for x in (*state, torch.full((BATCH, HEADS), -1e30))]
    if not normalized:
        state = [state[0], None, None]
    found, denominators = [], []
    for tokens in (slice(0, EARLIER), slice(EARLIER, EARLIER + 1), slice(EARLIER + 1, total)):
        kinds = [torch.float32 if kind in ("identity", "turned_relu") and i < 2 else dtype for i in range(3)]
        pieces = [x[:, :, tokens].to(device, to) for x, to in zip(given, kinds, strict=True)]
        maps = side(sides[0]), side(sides[1]), weights
        mask = real[:, tokens].to(device) if masked else None
        rest = {"log_weight": cut(log_weight, tokens), "log_decay": cut(log_decay, tokens)}
        output, normalizer, state = decode_step(*pieces, *maps, tuple(state), token_mask=mask, **rest)
        found.append(output.transpose(1, 2).cpu().double())
        denominators.append(normalizer.transpose(1, 2).cpu().double())
    outputs = torch.cat(found, 1)
    assert (outputs[~real] == 0).all()
    expected = wanted[0].transpose(1, 2)[real]
    assert (outputs[real] - expected).abs().max() < LIMITS[dtype] * expected.abs().max()
    scale = state[2].cpu().double().exp()[..., None, None] if normalized else 1
    assert (state[0].cpu().double() * scale - wanted[2]).abs().max() < 1e-5 * wanted[2].abs().max()
    if normalized:
        positive = wanted[1].transpose(1, 2)[real].isfinite()  # products of pairs forgotten apart may not be
        found_logs, logs = (x[real][positive] for x in (torch.cat(denominators, 1), wanted[1].transpose(1, 2)))
        torch.testing.assert_close(found_logs, logs, rtol=1e-4, atol=1e-4)
        assert (state[1].cpu().double() * scale[..., 0] - wanted[3]).abs().max() < 1e-5 * wanted[3].abs().max()


KINDS = ("identity", "elu", "relu", "turned_relu", "projected_pairs")


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("decay", ["none", "token", "feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_one_after_the_other(kind: str, decay: str, masked: bool) -> None:
    _check(kind, masked=masked, decay=decay, weighted=masked, normalized=True, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str) -> None:
    _check(kind, masked=True, decay="token", weighted=True, normalized=True, dtype=torch.float16)


@pytest.mark.parametrize("decay", ["none", "feature"])
def test_sums_as_they_are(decay: str) -> None:
    _check("identity", masked=True, decay=decay, weighted=False, normalized=False, dtype=torch.float32)


def test_weights_that_no_float_holds() -> None:
    """A key of weight exp(500) leaves nothing of those before it, and one of exp(-500) changes nothing."""
    torch.manual_seed(0)
    q, k, v = (torch.rand(1, 1, 3, 16) for _ in range(3))
    state = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16), torch.full((1, 1), -1e30)
    log_weight = torch.tensor([[[0.0, 500.0, -500.0]]])
    given = q, k, v, TokenMap("identity"), TokenMap("identity"), KeyWeights(), state
    output, normalizer, (kv, _, top) = decode_step(*given, log_weight=log_weight)
    torch.testing.assert_close(output[0, 0], v[0, 0, [0, 1, 1]])
    assert top.item() == 500
    assert normalizer.isfinite().all()
    torch.testing.assert_close(kv[0, 0], k[0, 0, 1, :, None] * v[0, 0, 1])


def test_what_is_forgotten_does_not_weigh_on() -> None:
    """Where a heavy key has decayed, a light one after it is read in full precision."""
    q, k, v = torch.ones(1, 1, 2, 16), torch.ones(1, 1, 2, 16), torch.randn(1, 1, 2, 16)
    state = torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16), torch.full((1, 1), -1e30)
    given = q, k, v, TokenMap("identity"), TokenMap("identity"), KeyWeights(), state
    decay = torch.tensor([0.0, -100.0])[None, None, :, None].expand(1, 1, 2, 16)
    log_weight = torch.tensor([[[60.0, -30.0]]])  # of exp(-40) and exp(-30)
    found = decode_step(*given, log_weight=log_weight, log_decay=decay)[0]
    share = torch.tensor([-40.0, -30.0]).softmax(0)
    torch.testing.assert_close(found[0, 0, 1], share @ v[0, 0])


def test_operator() -> None:
    """Schema and fake kernel, as PyTorch checks them."""
    q, k, v = (torch.rand(1, 2, 2, 16) for _ in range(3))
    state = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16), torch.zeros(1, 2)
    side = 1.0, None, None, None
    torch.library.opcheck(
        torch.ops.hf_linear_attn.linear_attention_step,
        (q, k, v, *state, None, None, None, 1, *side, *side, 1.0, None),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_refusals() -> None:
    q, k, v = (torch.rand(1, 2, 1, 16) for _ in range(3))
    state = torch.zeros(1, 2, 16, 16), None, None
    elu, relu, plain = TokenMap("elu"), TokenMap("relu"), KeyWeights()
    with pytest.raises(ValueError, match="two maps of one of"):
        decode_step(q, k, v, elu, relu, plain, state)
    with pytest.raises(ValueError, match="two maps of one of"):
        decode_step(q, k, v, TokenMap("projected_exp"), TokenMap("projected_exp"), plain, state)
    with pytest.raises(ValueError, match="without z takes no weights"):
        decode_step(q, k, v, elu, elu, KeyWeights(1.0, torch.zeros(2, 16)), state)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("decay", ["none", "feature"])
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_tokens_one_after_the_other(kind: str, decay: str, dtype: torch.dtype) -> None:
    _check(kind, masked=True, decay=decay, weighted=True, normalized=True, dtype=dtype, device="cuda")
