"""BigBird (arXiv:2007.14062): blocks of a window, global blocks and random blocks.

ITC: a query sees the w blocks around its own, the first and the last block, and r random blocks of its head;
queries of the first and the last block see everything. Causal: its own block and w // 2 before it, the first block,
r random ones from the past. Cost O(n (w + 2 + r) b) per head.

ETC adds g global tokens: y_i = softmax([s q_i k_g - log g ; s q_i k_S]) [o_g ; v_S], o_g = softmax(s q_g K^T) V. In
the paper they travel through the layers beside the text; a layer alone has q_g and k_g of its own, and what a global
token reads here (o_g) is what the text reads from it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops.block_patterns import bigbird_lists, hashed, random_blocks
from hf_linear_attn.ops.block_sparse import ANYONE, Extra, block_grid, block_sparse_attention
from hf_linear_attn.ops.calibration import Row, choose_per_head, head_errors, real_rows
from hf_linear_attn.ops.compaction import CompactedCall, compact, init_kv_state, kv_state_after
from hf_linear_attn.ops.sliding_window import sliding_window_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["BigBirdAttention", "BigBirdConfig"]

logger = logging.getLogger(__name__)

FORMS = ("itc", "etc")
ETC_REFUSAL = (
    "form='etc' is for encoders: its global tokens read the whole sequence, of which a decoder must not see the "
    "future. Allowed here: form='itc'."
)


@dataclass(frozen=True)
class BigBirdConfig(VariantConfig):
    """Options of `bigbird`.

    Attributes:
        block_size: b, in tokens.
        num_window_blocks: w, odd; half of the others on each side, on decoders only the past half.
        num_random_blocks: r, for each block of queries and head.
        seed: of the random blocks and of the start of the global tokens.
        form: `"itc"`, or `"etc"` with additional global tokens (encoders only).
        num_global_tokens: g of `form="etc"`; None means 32.
    """

    block_size: int = 64
    num_window_blocks: int = 3
    num_random_blocks: int = 3
    seed: int = 0
    form: str = "itc"
    num_global_tokens: int | None = None

    def validate(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}.")
        if self.form == "itc" and self.num_global_tokens is not None:
            raise ValueError(
                f"num_global_tokens={self.num_global_tokens!r} needs form='etc'; with 'itc' leave it None."
            )
        least = {"block_size": 1, "num_window_blocks": 1, "num_random_blocks": 0, "seed": 0, "num_global_tokens": 1}
        for name, lowest in least.items():
            given = getattr(self, name)
            if name == "num_global_tokens" and given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int) or given < lowest:
                raise ValueError(f"{name} must be an int >= {lowest}, got {given!r}.")
        if self.num_window_blocks % 2 == 0:
            raise ValueError(f"num_window_blocks must be odd (half on each side), got {self.num_window_blocks}.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"block_size": -(-length // (6 if is_causal else 7))}


@functools.cache
def _note_full(limit: int) -> None:
    logger.info("bigbird: calls of up to %d tokens are full attention, which the pattern covers there.", limit)


@register_variant(
    "bigbird",
    config=BigBirdConfig,
    title="BigBird (window, global and random blocks)",
    paper="Big Bird: Transformers for Longer Sequences, arXiv:2007.14062",
    cost="n (g+w+r) b d",
    state="kv",
    exact_limit=_exact_limit,
    test_options=(
        {"block_size": 4},
        {"block_size": 8, "num_window_blocks": 1, "num_random_blocks": 1, "seed": 7},
        {"block_size": 4, "form": "etc", "num_global_tokens": 3},
    ),
)
class BigBirdAttention(AttentionVariant):
    """Block-sparse attention of one layer. Blocks are counted by rank among the real tokens."""

    config: BigBirdConfig
    codes: torch.Tensor

    def __init__(self, config: BigBirdConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        self.num_global_tokens = 0
        # A number per head from which its random blocks are drawn, saved with the weights.
        self.register_buffer("codes", torch.zeros(context.num_heads, dtype=torch.long))
        if config.form == "etc":
            if context.is_causal:
                raise ValueError(ETC_REFUSAL)
            self.num_global_tokens = config.num_global_tokens or 32
            shape = (2, context.num_heads, self.num_global_tokens, context.head_dim)
            self.global_tokens = nn.Parameter(torch.empty(shape))  # their queries, their keys
        self.reset_parameters()

    def _noise(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(self._layer_seed())
        return torch.randn(shape, generator=generator, device="cpu")

    def _layer_seed(self) -> int:
        return self.config.seed * 1_000_003 + self.context.layer_idx

    @torch.no_grad()
    def reset_parameters(self) -> None:
        heads = torch.arange(self.context.num_heads, device="cpu")
        self.codes.copy_(hashed(hashed(torch.tensor(self._layer_seed(), device="cpu")) + heads))
        if self.num_global_tokens:
            self.global_tokens.copy_(0.02 * self._noise(*self.global_tokens.shape))

    @torch.no_grad()
    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Global tokens start as the queries and keys of g random embeddings, N(0, 0.02)."""
        if self.num_global_tokens:
            embeddings = 0.02 * self._noise(self.num_global_tokens, query[0].shape[1]).to(query[0])
            projected = torch.stack([F.linear(embeddings, weight, bias) for weight, bias in (query, key)])
            self.global_tokens.copy_(projected.unflatten(-1, (self.context.num_heads, -1)).transpose(1, 2))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Per head: global tokens as they are, or each the mean first token ([CLS]) plus noise if that errs less."""
        rows = [row for x in batches for row in real_rows(x.query, x.key, x.value, x.key_padding)]
        if not self.num_global_tokens or not rows:
            return
        tokens, scaling = self.global_tokens, batches[0].scaling
        first = torch.stack([torch.stack([row[i][0, :, :1] for row in rows]).mean(0) for i in (0, 1)]).to(tokens)
        noise = self._noise(*tokens.shape).to(tokens)
        candidates = [tokens.clone(), first + 0.1 * first.std(-1, keepdim=True) * noise]

        def attend(row: Row) -> torch.Tensor:
            q, k, v = (x.to(tokens) for x in row)
            return self(AttentionInputs(q, k, v, scaling=scaling))[0]

        errors = []
        for candidate in candidates:
            tokens.copy_(candidate)
            errors.append(head_errors(attend, rows, is_causal=False, scaling=scaling))
        tokens.copy_(torch.where(choose_per_head(errors)[:, None, None] == 1, candidates[1], candidates[0]))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def full_blocks(self) -> int:
        """Sequences of so many blocks are covered by the pattern: the attention is softmax attention."""
        config = self.config
        return config.num_random_blocks + config.num_window_blocks // 2 + (2 if self.context.is_causal else 3)

    def random_blocks(self, row: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The random blocks of query blocks `row` in sequences of `blocks` blocks; see the op of this name."""
        config = self.config
        return random_blocks(
            row,
            blocks,
            codes=self.codes,
            number=config.num_random_blocks,
            num_window_blocks=config.num_window_blocks,
            is_causal=self.context.is_causal,
        )

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.key_padding, past)
        k_len = call.k.shape[2]
        limit = self.full_blocks() * self.config.block_size
        if k_len <= limit and not self.num_global_tokens:  # by the shape of this call alone: nothing is remembered
            if not torch.compiler.is_compiling():
                _note_full(limit)
            out = self._full(call, inputs)
        else:
            aligned = inputs.key_padding is None and state is None and inputs.query.shape[2] == k_len
            grid = block_grid(call, self.config.block_size, aligned=aligned)
            drawn = self.random_blocks(grid.row, grid.blocks)
            lists = bigbird_lists(grid.row, grid.blocks, drawn, self.config.num_window_blocks, inputs.is_causal)
            extra = self._global_columns(call, inputs.scaling) if self.num_global_tokens else None
            out = block_sparse_attention(call, grid, lists, scaling=inputs.scaling, extra=extra)
        return call.restore(out), None if state is None else kv_state_after(call)

    def _full(self, call: CompactedCall, inputs: AttentionInputs) -> torch.Tensor:
        k_len = call.k.shape[2]
        right = 0 if inputs.is_causal else k_len
        real = call.rank >= 0
        qkv = call.q, call.k, call.v
        return sliding_window_attention(*qkv, left=k_len, right=right, scaling=inputs.scaling, key_allowed=real)

    def _global_columns(self, call: CompactedCall, scaling: float) -> Extra:
        """Keys and what the global tokens read; at equal keys the g of them weigh as much as one token."""
        B = call.k.shape[0]
        query, key = self.global_tokens.to(call.k.dtype)[:, None].expand(-1, B, -1, -1, -1)
        real = call.rank >= 0
        mask = (real | ~real.any(-1, keepdim=True)).expand(B, -1)[:, None, None, :]
        read = F.scaled_dot_product_attention(query, call.k, call.v, attn_mask=mask, scale=scaling)
        block = torch.full((1, self.num_global_tokens), ANYONE, device=key.device)
        return Extra(key, read, block, -math.log(self.num_global_tokens))
