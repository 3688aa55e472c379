"""Queries, hashes and outcomes of the tests of locality-sensitive hashing."""

import torch

from hf_linear_attn.ops.lsh.attention import hash_buckets, visible


def draw(q_len, k_len, heads=2, dim=5):
    generator = torch.Generator().manual_seed(k_len)
    k, v = (torch.randn(2, heads, k_len, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return torch.randn(2, heads, q_len, dim, generator=generator, dtype=torch.float64), k, v


def rotations(buckets, rounds, heads=2, dim=5):
    return torch.randn(heads, dim, rounds, buckets // 2, generator=torch.Generator().manual_seed(1))


def where_to_look(q, k, given, real, chunk_size, is_causal):
    buckets = max(1, 2 * given.shape[3])
    return visible(hash_buckets(q, given), hash_buckets(k, given), real, chunk_size, buckets, is_causal=is_causal)


def outcome(function, leaves, *args, **options):
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    output = function(*leaves, *args, **options)
    output.sin().sum().backward()
    return [output.detach(), *(x.grad for x in leaves)]
