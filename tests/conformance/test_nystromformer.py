"""Nystromformer beside Transformers' own class and the nystrom-attention package, same weights and inputs."""

import pytest
import torch
from nystrom_attention import NystromAttention
from torch import nn
from transformers import NystromformerConfig as TheirConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.nystromformer import NystromformerAttention, NystromformerConfig

pytestmark = pytest.mark.conformance

DIM, LANDMARKS, LENGTH, KERNEL = 16, 8, 64, 5


def ours(q, k, v, padding=None, conv=None):
    heads = q.shape[1]
    config = NystromformerConfig(num_landmarks=LANDMARKS, conv_kernel_size=None if conv is None else KERNEL)
    module = NystromformerAttention(config, LayerContext(0, 1, heads * DIM, heads, DIM, LENGTH, is_causal=False))
    if conv is not None:
        module.conv_weight.copy_(conv)
    return module(AttentionInputs(q, k, v, token_mask=padding, scaling=DIM**-0.5))[0].transpose(1, 2).flatten(2)


def transformers_layer(heads):
    torch.manual_seed(0)
    config = TheirConfig(
        hidden_size=heads * DIM,
        num_attention_heads=heads,
        num_landmarks=LANDMARKS,
        segment_means_seq_len=LENGTH,
        conv_kernel_size=KERNEL,
    )
    return NystromformerSelfAttention(config).eval()


def package_layer(heads, dim=32):
    torch.manual_seed(0)
    layer = NystromAttention(
        dim, dim_head=DIM, heads=heads, num_landmarks=LANDMARKS, residual_conv_kernel=KERNEL
    ).eval()
    layer.to_out = nn.Identity()
    return layer


def split(x, heads):
    return x.unflatten(-1, (heads, DIM)).transpose(1, 2)


def run_transformers(theirs, hidden, heads):
    qkv = (split(layer(hidden), heads) for layer in (theirs.query, theirs.key, theirs.value))
    return theirs(hidden)[0], ours(*qkv, conv=theirs.conv.weight[:, 0, :, 0])


def run_package(theirs, hidden, heads, mask=None):
    qkv = (split(x, heads) for x in theirs.to_qkv(hidden).chunk(3, -1))
    return theirs(hidden, mask=mask), ours(*qkv, padding=mask, conv=theirs.res_conv.weight[:, 0, :, 0])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def test_transformers_with_its_inverse_scaled_per_head():
    """Their other `init_option` scales each head's inverse by itself, as ours always does."""
    theirs = transformers_layer(heads=4)
    theirs.init_option = "exact"
    expected, output = run_transformers(theirs, 2 * torch.randn(3, LENGTH, 4 * DIM), 4)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_transformers_default_on_one_head_and_one_row():
    """Where one matrix is the whole batch, the maximum over the batch is its own."""
    expected, output = run_transformers(transformers_layer(heads=1), 2 * torch.randn(1, LENGTH, DIM), 1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_package_on_one_head_and_one_row():
    expected, output = run_package(package_layer(heads=1), 2 * torch.randn(1, LENGTH, 32), 1)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers", "package"])
def test_on_purpose_the_inverse_is_not_scaled_by_the_whole_batch(name):
    """Theirs takes the norms' maximum over the batch: a row's output changes with its batch-mate. Ours does not."""
    heads = 2
    layer, run = {
        "transformers": (transformers_layer(heads), run_transformers),
        "package": (package_layer(heads), run_package),
    }[name]
    hidden = 2 * torch.randn(2, LENGTH, 32)
    hidden[0] *= 10  # sharp attention: columns of its matrix that sum to much more than 1
    alone, beside = run(layer, hidden[1:], heads), run(layer, hidden.flip(0), heads)
    torch.testing.assert_close(beside[1][:1], alone[1], rtol=1e-4, atol=1e-4)
    assert relative(beside[0][:1], alone[0]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformers", "package"])
def test_on_purpose_padding_is_not_in_the_segment_means(name):
    """Padded and unpadded runs of theirs differ on the real tokens: pads take segments, or are averaged in."""
    heads, n_real = 1, 48
    hidden = 2 * torch.randn(1, LENGTH, {"transformers": DIM, "package": 32}[name])
    mask = torch.arange(LENGTH)[None] < n_real
    if name == "package":
        layer = package_layer(heads)
        padded, output = run_package(layer, hidden, heads, mask)
        unpadded, bare = run_package(layer, hidden[:, :n_real], heads)
    else:
        layer = transformers_layer(heads)
        qkv = [split(x(hidden), heads) for x in (layer.query, layer.key, layer.value)]
        additive = torch.zeros(1, 1, 1, LENGTH).masked_fill(~mask, torch.finfo(torch.float32).min)
        padded = layer(hidden, additive)[0]
        conv = layer.conv.weight[:, 0, :, 0]
        output, bare = ours(*qkv, padding=mask, conv=conv), ours(*(x[:, :, :n_real] for x in qkv), conv=conv)
        layer.seq_len = n_real
        unpadded = layer(hidden[:, :n_real])[0]
    torch.testing.assert_close(bare, unpadded, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output[:, :n_real], bare, rtol=1e-4, atol=1e-4)
    assert relative(padded[:, :n_real], unpadded) > 1e-2
