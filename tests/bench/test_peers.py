"""Peers: what is run beside ours has the same projections, and where it is the same function, the same output."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from hf_linear_attn.bench.peers import registry as module
from hf_linear_attn.bench.peers.flex import MASKS, flex_block_mask
from hf_linear_attn.bench.peers.layers import build_variant
from hf_linear_attn.bench.peers.registry import (
    SOFTMAX,
    LayerShape,
    available_peers,
    get_peer,
    list_peers,
    unavailable_peers,
)
from hf_linear_attn.registry import get_variant

HEADS, WIDTH = 3, 24
# Of Transformers and PyTorch, which are always there; the others need the extra [conformance].
INSTALLED = [name for name in list_peers() if get_peer(name).package in ("torch", "transformers")]
PACKAGES = [name for name in list_peers() if name not in INSTALLED]
FLEX = [name for name in INSTALLED if name.startswith("flex")]
PLAIN = [name for name in INSTALLED if name not in FLEX]


def shape_of(name: str, length: int = 1024, width: int = WIDTH) -> LayerShape:
    return LayerShape(2, length, width, HEADS, get_peer(name).causal)


def projection_sizes(layer: nn.Module) -> int:
    """Numbers in the linear maps of hidden states."""
    maps = [m for m in layer.modules() if isinstance(m, nn.Linear) and m.in_features == WIDTH]
    return sum(parameter.numel() for m in maps for parameter in m.parameters())


def check_runs_beside_ours(name: str, length: int = 1024) -> None:
    peer, shape = get_peer(name), shape_of(name, length)
    theirs, ours = peer.build(shape), peer.ours(shape)
    assert projection_sizes(theirs) == projection_sizes(ours) > 0
    assert not any(m.p for layer in (theirs, ours) for m in layer.modules() if isinstance(m, nn.Dropout))
    for layer in (theirs, ours):
        assert not layer.training
        with torch.no_grad():
            output = layer(shape.example())
        assert output.shape == (2, length, WIDTH)
        assert output.isfinite().all()
        layer.train()(shape.example()).square().mean().backward()
        reached = [p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters()]
        assert all(reached)


@pytest.mark.parametrize("name", PLAIN)
def test_installed_peers(name):
    check_runs_beside_ours(name)


@pytest.mark.conformance
@pytest.mark.parametrize("name", [name for name in PACKAGES if "cpu" in get_peer(name).devices])
def test_package_peers(name):
    check_runs_beside_ours(name, 512)


def test_bigbird_is_full_attention_where_its_model_falls_back():
    check_runs_beside_ours("transformers bigbird", 704)


def test_eager_is_softmax_attention():
    for side in ("", " causal"):
        peer, shape = get_peer("eager" + side), shape_of("eager" + side, 33)
        theirs, ours = peer.build(shape), peer.ours(shape)
        theirs.load_state_dict(ours.state_dict(), strict=False)
        torch.testing.assert_close(theirs(shape.example()), ours(shape.example()), atol=1e-5, rtol=1e-5)


def test_longformer_is_the_same_function():
    peer, shape = get_peer("transformers longformer"), shape_of("transformers longformer")
    theirs, ours = peer.build(shape), peer.ours(shape)
    for name in ("query", "key", "value"):
        getattr(ours, name).load_state_dict(getattr(theirs.attention, name).state_dict())
        other = getattr(theirs.attention, f"{name}_global").state_dict()
        getattr(ours.attend.variant, f"{name}_global").load_state_dict(other)
    ours.output.load_state_dict(theirs.output.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(ours(shape.example()), theirs(shape.example()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [448, *(pytest.param(n, marks=pytest.mark.slow) for n in (1000, 1024))])
@pytest.mark.parametrize("name", FLEX)
def test_flex_masks_are_those_of_our_variants(name, length):
    """The uncompiled form, which evaluates the mask everywhere."""
    peer, shape = get_peer(name), shape_of(name, length)
    theirs, ours = peer.build(shape), peer.ours(shape)
    theirs.load_state_dict(ours.state_dict())
    theirs.attend._compiled = lambda q, k, v, mask, scale: flex_attention(q, k, v, block_mask=mask, scale=scale)
    with torch.no_grad():
        torch.testing.assert_close(theirs(shape.example()), ours(shape.example()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [448, 1000])
@pytest.mark.parametrize("name", FLEX)
def test_flex_blocks_cover_the_mask(name, length):
    """Full blocks are full, partial ones are not, and no other has a visible key."""
    peer, shape = get_peer(name), shape_of(name, length)
    variant = build_variant(shape, peer.method, peer.options_for(shape))
    visible, heads = MASKS[peer.method](variant, shape, torch.device("cpu"))
    mask = flex_block_mask(visible, heads, length, 64, torch.device("cpu"))
    place = torch.arange(length)
    blocks = -(-length // 64)
    padded = torch.zeros(heads, blocks * 64, blocks * 64, dtype=torch.bool)
    for h in range(heads):
        seen = visible(torch.tensor(0), torch.tensor(h), place[:, None], place[None])
        padded[h, :length, :length] = seen
    tiles = padded.view(heads, blocks, 64, blocks, 64).transpose(2, 3).flatten(3)
    kind = torch.zeros(heads, blocks, blocks, dtype=torch.long)
    for number, indices, value in (
        (mask.kv_num_blocks, mask.kv_indices, 1),
        (mask.full_kv_num_blocks, mask.full_kv_indices, 2),
    ):
        for h in range(heads):
            for row in range(blocks):
                kind[h, row, indices[0, h, row, : number[0, h, row]].long()] = value
    assert torch.equal(kind, tiles.any(-1).long() + tiles.all(-1).long())


@pytest.mark.heavy
@pytest.mark.parametrize("name", FLEX)
def test_compiled_flex_is_ours(name):
    peer, shape = get_peer(name), LayerShape(1, 1000, 64, 2, get_peer(name).causal)
    assert peer in available_peers("cpu")
    theirs, ours = peer.build(shape), peer.ours(shape)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(theirs(shape.example()), ours(shape.example()), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list_peers())
def test_on_a_gpu(name):
    """Every peer that runs there, in bf16, with its gradients; flex and fla are the same functions as ours."""
    peer = get_peer(name)
    if peer.missing("cuda") is not None:
        assert name in unavailable_peers("cuda")
        return
    shape = LayerShape(2, 1024, 128, 2, peer.causal)
    theirs, ours = (layer.to("cuda", torch.bfloat16) for layer in (peer.build(shape), peer.ours(shape)))
    hidden = shape.example("cuda", torch.bfloat16)
    if name in FLEX or name in ("fla linear", "fla retention"):
        theirs.load_state_dict(ours.state_dict(), strict=False)
        expected, found = ours(hidden).float(), theirs(hidden).float()
        assert (found - expected).norm() < 0.02 * expected.norm()
    for layer in (theirs, ours):
        layer.train()(hidden).float().square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in layer.parameters())


def test_every_peer_stands_beside_a_variant_that_serves_it():
    names = list_peers()
    assert len(set(names)) == len(names)
    for name in names:
        peer = get_peer(name)
        assert set(peer.trains_on) <= set(peer.devices)
        if peer.method == SOFTMAX:
            continue
        spec = get_variant(peer.method)
        assert spec.decoder if peer.causal else spec.encoder
        spec.config_class.from_dict(peer.options_for(shape_of(name)))


def test_a_peer_is_available_or_has_a_reason(monkeypatch):
    for device in ("cpu", "cuda"):
        reasons = unavailable_peers(device)
        assert sorted([*reasons, *(peer.name for peer in available_peers(device))]) == sorted(list_peers())
    assert unavailable_peers("cpu")["fla linear"] in ("runs on cuda only", "flash-linear-attention is not installed")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "linformer" else object())
    assert unavailable_peers("cpu")["linformer"] == "linformer is not installed"
    monkeypatch.setattr(module, "_compiler", lambda: None)
    assert "C++ compiler" in unavailable_peers("cpu")["flex_attention window"]
    assert "flex_attention window" not in unavailable_peers("cuda")


def test_wrong_calls_are_named():
    with pytest.raises(ValueError, match=r"Unknown peer 'longfromer'.*transformers longformer"):
        get_peer("longfromer")
    longformer = get_peer("transformers longformer")
    with pytest.raises(ValueError, match="is_causal=False"):
        longformer.build(LayerShape(1, 1024, 24, 3, True))
    with pytest.raises(ValueError, match="is_causal=False"):
        longformer.ours(LayerShape(1, 1024, 24, 3, True))
    with pytest.raises(ValueError, match="length=1000; allowed with Transformers' Longformer: a multiple of 512"):
        longformer.build(LayerShape(1, 1000, 24, 3))
    with pytest.raises(ValueError, match="hidden_size=25; allowed: a multiple of num_heads=3"):
        LayerShape(1, 8, 25, 3)
    with pytest.raises(ValueError, match="length=0"):
        LayerShape(1, 0, 24, 3)
    with pytest.raises(ValueError, match="'nystromformer' does not serve is_causal=True"):
        build_variant(LayerShape(1, 8, 24, 3, True), "nystromformer", {})
