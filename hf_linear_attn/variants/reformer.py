"""Reformer, attention inside buckets of locality-sensitive hashes, arXiv:2001.04451.

bucket(x) = argmax [x R; -x R], R random. Per round the keys are sorted by (bucket, position); a query is placed among
them by its own bucket and position and sees its chunk of keys and the one before. Rounds are merged exactly: softmax
over the union of what they show. Cost n log n for the sort, 4 n c d a round for chunks of c keys. Where buckets grow
with the length, a query of an encoder is placed so that the two chunks show most of its bucket.

A checkpoint's queries are not its keys. They are hashed apart with the same R, keys stay as they are, and a token may
attend to itself; `share_qk=True` is the paper's form. In a decoder, chunks of all sorted keys depend on later tokens
and leak even when masked: each bucket is cut into chunks from its first key on, which no later token moves, and one
more round goes by position alone, so that a query always sees c + 1 to 2 c tokens up to itself.

With calibration a head may center its keys, or queries and keys, balance their second moments, and take normalized
keys of its own for the directions R: what lowers its output error on the calibration data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.base.masking import known_all_real, safe_masked_fill
from hf_linear_attn.ops.lsh.attention import SELF_LOGIT, hash_buckets, level_attention
from hf_linear_attn.ops.lsh.decode import decode_token, init_lsh_state, lsh_past, lsh_state_after
from hf_linear_attn.ops.lsh.levels import Level, growing_levels, hashed_levels, levels_up_to
from hf_linear_attn.ops.starts.calibration import balancing_maps, choose_start, collect_rows, head_tokens
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["ReformerAttention", "ReformerConfig"]


@dataclass(frozen=True)
class ReformerConfig(VariantConfig):
    """Options of `reformer`.

    Attributes:
        num_hashes: rounds of hashing, 1 to 8 in the literature. More are closer to softmax and cost as much each: 2
            start about 1.4 to 2.2 times as far from it as 4.
        num_buckets: buckets of a round, an even number, or 1 for sorting by position alone. "length": as fill about a
            chunk each, 8 to 512 by the tokens of a sequence, or on decoders by the place of a token, for inputs of up
            to the model's `max_length`; up to 2 num_hashes chunk_size tokens are read whole, as softmax does, which
            costs no more. None, once the default: by `max_length` alone, 4 to 16.
        chunk_size: keys per chunk, c.
        share_qk: the keys, normalized, serve as keys and as they are as queries, and a token attends to itself only
            where it sees nothing else. The checkpoint's queries are not used: far from it at the start.
        seed: of the random directions, which are saved with the model.
    """

    num_hashes: int = 4
    num_buckets: int | str | None = "length"
    chunk_size: int = 64
    share_qk: bool = False
    seed: int = 0

    def validate(self) -> None:
        self.require_integer("chunk_size")
        self.require_width("num_hashes")
        if isinstance(self.num_buckets, str):
            self.require_choice("num_buckets", ("length",))
        else:
            self.require_width("num_buckets", optional=True)
        self.require_integer("seed", at_least=0)
        self.require_bool("share_qk")
        if isinstance(self.num_buckets, int) and self.num_buckets > 1 and self.num_buckets % 2:
            allowed = 'None, "length", 1 or an even integer of at least 2'
            raise ValueError(f"num_buckets={self.num_buckets}; allowed: {allowed}.")


@register_variant(
    "reformer",
    config=ReformerConfig,
    title="Reformer (LSH attention)",
    paper="Reformer: The Efficient Transformer, arXiv:2001.04451",
    cost="n log n",
    guide=("content-based", "similar tokens that are far apart: a query sees the keys that hash alike"),
    state="kv",
    exact_limit=lambda length, is_causal: {"chunk_size": length},
    test_options=({"chunk_size": 4, "num_hashes": 2, "num_buckets": 6}, {"chunk_size": 2, "num_hashes": 2}),
    masked_export=True,
)
class ReformerAttention(AttentionVariant):
    """LSH attention of one layer. Position means rank among the real tokens.

    Buffers (persistent): `rotations [H, D, rounds, num_buckets / 2]`; unless queries are keys `query_mean`,
    `key_mean [H, D]` and `query_map`, `key_map [H, D, D]`, applied as `(q - query_mean) @ query_map` before hashing.
    The decode state holds all keys, values and buckets, and which tokens of each bucket came last.
    """

    config: ReformerConfig
    rotations: torch.Tensor
    query_mean: torch.Tensor
    key_mean: torch.Tensor
    query_map: torch.Tensor
    key_map: torch.Tensor

    def __init__(self, config: ReformerConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        heads, dim, buckets = context.num_heads, context.head_dim, config.num_buckets
        if buckets is None:
            buckets = min(max(4, context.max_length // (4 * config.chunk_size) * 2), 16)
        growing = growing_levels(context.max_length, config.chunk_size, config.num_hashes)
        self._levels = growing if isinstance(buckets, str) else (Level(0, buckets),)
        self.register_buffer("rotations", torch.empty(heads, dim, config.num_hashes, self._levels[-1].buckets // 2))
        if not config.share_qk:
            for name, shape in (("mean", (heads, dim)), ("map", (heads, dim, dim))):
                self.register_buffer(f"query_{name}", torch.empty(shape))
                self.register_buffer(f"key_{name}", torch.empty(shape))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Directions drawn from (seed, layer_idx), means 0, maps the identity."""
        generator = self.context.generator(self.config.seed)
        self.rotations.copy_(torch.randn(self.rotations.shape, generator=generator, device="cpu"))
        if not self.config.share_qk:
            for name in ("query", "key"):
                getattr(self, f"{name}_mean").zero_()
                x = getattr(self, f"{name}_map")
                x.copy_(torch.eye(x.shape[-1], device=x.device).expand_as(x))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's hashing by its output error against softmax on these inputs, the published first."""
        if self.config.share_qk or not self.rotations.numel():
            return
        rows, scaling = collect_rows(batches), batches[0].scaling
        q, k = head_tokens(rows)
        a, c = q.mean(1), k.mean(1)
        zero, identity = torch.zeros_like(a), torch.eye(q.shape[-1], device=q.device).expand_as(self.query_map)
        centered = k - c[:, None]
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        drawn = torch.randint(k.shape[1], self.rotations[0, 0].shape, generator=generator).to(k.device)
        starts = []
        for query_mean, key_mean, query_map, key_map in (
            (zero, zero, identity, identity),
            (a, c, *balancing_maps(q - a[:, None], centered)),
            # Without their mean, queries would look for other keys: it changes the logits by more than a constant.
            (zero, c, *balancing_maps(q, centered)),
        ):
            start = {"query_mean": query_mean, "key_mean": key_mean, "query_map": query_map, "key_map": key_map}
            directions = F.normalize((k - key_mean[:, None]) @ key_map, dim=-1)[:, drawn].movedim(-1, 1)
            starts += [start, {**start, "rotations": directions}]
        levels, self._levels = self._levels, hashed_levels(self._levels)  # texts that are read whole tell nothing
        try:
            choose_start(dict(self.named_buffers()), starts, self.error_meter(rows, scaling))
        finally:
            self._levels = levels

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        sizes = self.context.head_dim, self.config.num_hashes, self.config.chunk_size, self._levels
        return init_lsh_state(batch_size, self.context.num_heads, *sizes, dtype, device)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        query, key, share, real = inputs.query, inputs.key, self.config.share_qk, inputs.token_mask
        levels, as_long = self._levels, real is None and not inputs.is_causal
        levels = levels if state is not None else levels_up_to(levels, key.shape[2], all_as_long=as_long)
        sizes = [level.buckets for level in levels]
        if share:
            key = safe_masked_fill(key, real)  # before the norm: the gradient of inf is nan, also times 0
            offset, k_bucket = key.shape[2] - query.shape[2], hash_buckets(key, self.rotations, None, sizes)
            query, q_bucket = (x[:, :, offset:] if offset else x for x in (key, k_bucket))
            key = F.normalize(key, dim=-1) / inputs.scaling
        else:
            q_bucket = self._hash(query, self.query_mean, self.query_map, sizes)
            k_bucket = self._hash(key, self.key_mean, self.key_map, sizes)
        step = state is not None and inputs.is_causal and key.shape[2] == 1 and known_all_real(real)
        if state is not None and step and (len(levels) == 1 or not torch.compiler.is_compiling()):
            token, bias = (query, key, inputs.value, q_bucket, k_bucket), SELF_LOGIT if share else 0.0
            output, after = decode_token(*token, state, levels, scaling=inputs.scaling, self_bias=bias)
            return output.to(inputs.query.dtype), after
        past = past_bucket = None
        if state is not None:
            past_key, past_value, held = lsh_past(state)
            past, past_bucket = (past_key, past_value, state["count"]), (held, held, state["count"])
        call = compact(query, key, inputs.value, real, past)
        bucket = compact(q_bucket, k_bucket, k_bucket, real, past_bucket)
        given = call, bucket.q, bucket.k, levels, self.config.chunk_size
        options: dict[str, Any] = {"is_causal": inputs.is_causal, "scaling": inputs.scaling, "self_penalty": share}
        options |= {"centered": self.config.num_buckets == "length", "all_real": real is None and state is None}
        output = call.restore(level_attention(*given, **options)).to(inputs.query.dtype)
        return output, None if state is None else lsh_state_after(call, bucket.k, self.config.chunk_size, levels)

    def _hash(self, x: torch.Tensor, mean: torch.Tensor, linear_map: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Hashes of `(x - mean) @ linear_map`: the map goes to the directions, which are few."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            used = self.rotations[..., : max(sizes) // 2].to(dtype)
            rotations = (linear_map.to(dtype) @ used.flatten(2)).view(used.shape)
        return hash_buckets(x, rotations, mean, sizes)
