"""Near-copies planted far away: how many of them a layer finds, by the length of its input.

Prints the table for a method that finds them by its hashes, with the seconds of a layer of 12 heads of 64 channels,
projections included, beside softmax and the same method in Transformers:

    python -m tests.planted 2048 8192 32768
"""

import sys
import time

import torch
import torch.nn.functional as F

from hf_linear_attn.bench.peers.layers import LayerShape, our_layer, softmax_layer
from hf_linear_attn.bench.peers.packages import transformers_reformer
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, LayerContext

COSINE, SHARPNESS, PLANTED, DIM = 0.95, 4.0, 256, 64


def planted_call(length, is_causal=False, seed=0):
    """Random tokens, some of whose queries have cosine 0.95 to a key at least a quarter of the input away.

    Returns:
        the call, the places of these queries and those of their keys, each `[PLANTED]`.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 1, length, DIM, generator=generator) for _ in range(3))
    part = length * 3 // 8
    places, rows = (torch.randperm(part, generator=generator)[:PLANTED] + first for first in (0, length - part))
    if not is_causal:  # half of them look ahead
        places[::2], rows[::2] = rows[::2].clone(), places[::2].clone()
    target = F.normalize(k[0, 0, places], dim=-1)
    noise = q[0, 0, rows]
    noise = F.normalize(noise - (noise * target).sum(-1, keepdim=True) * target, dim=-1)
    q[0, 0, rows] = (COSINE * target + (1 - COSINE**2) ** 0.5 * noise) * DIM**0.5
    return AttentionInputs(q * SHARPNESS, k, v, None, is_causal, DIM**-0.5), rows, places


def share_found(output, call, rows, places):
    """Share of the planted queries whose output is nearer to the value of their key than to 0."""
    wanted = call.value[0, 0, places]
    return float(((output[0, 0, rows] - wanted).norm(dim=-1) < wanted.norm(dim=-1) / 2).float().mean())


def build(key, length, is_causal=False, **options):
    spec = get_variant(key)
    return spec.module_class(spec.config_class(**options), LayerContext(0, 2, DIM, 1, DIM, length, is_causal))


@torch.no_grad()
def found_by(key, length, is_causal=False, *, max_length=None, **options):
    """Share of the planted copies that a new layer finds, in the mean over two inputs."""
    module = build(key, max_length or length, is_causal, **options)
    calls = [planted_call(length, is_causal, seed) for seed in range(2)]
    return sum(share_found(module(call)[0], call, *where) for call, *where in calls) / len(calls)


@torch.no_grad()
def found_by_softmax(length, is_causal=False):
    call, *where = planted_call(length, is_causal)
    output = F.scaled_dot_product_attention(call.query, call.key, call.value, is_causal=is_causal)
    return share_found(output, call, *where)


@torch.no_grad()
def seconds(layer, shape):
    """The fastest of two forwards."""
    hidden = torch.randn(1, shape.length, shape.hidden_size, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        layer(hidden)
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    print("| tokens | side | softmax finds | reformer finds | softmax, s | reformer, s | Transformers' reformer, s |")
    print("|---|---|---|---|---|---|---|")
    for tokens in map(int, sys.argv[1:] or ("2048", "8192")):
        for causal in (False, True):
            shape = LayerShape(1, tokens, 768, 12, causal)
            found = found_by_softmax(tokens, causal), found_by("reformer", tokens, causal)
            layers = softmax_layer(shape), our_layer(shape, "reformer", {}), transformers_reformer(shape)
            cells = [f"{x:.3f}" for x in found] + [f"{seconds(layer, shape):.2f}" for layer in layers]
            print(f"| {tokens:,} | {'decoder' if causal else 'encoder'} | {' | '.join(cells)} |", flush=True)
