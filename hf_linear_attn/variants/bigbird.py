"""BigBird (arXiv:2007.14062): blocks of a window, global blocks and random blocks.

ITC: a query sees the w blocks around its own, the first and the last block, and r random blocks of its head;
queries of the first and the last block see everything. Causal: its own block and w // 2 before it, the first block,
r random ones from the past. Cost O(n (w + 2 + r) b) per head.

ETC adds g global tokens: y_i = softmax([s q_i k_g + c ; s q_i k_S]) [o_g ; v_S], o_g = softmax(s q_g K^T) V. In the
paper they travel through the layers beside the text; a layer alone has q_g and k_g of its own, and what a global token
reads here (o_g) is what the text reads from it.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from hf_linear_attn.ops.base.compaction import compact, init_kv_state, kv_state_after
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.sparse.attention import BlockGrid, block_grid, block_sparse_attention, global_columns
from hf_linear_attn.ops.sparse.patterns import BlockLists, bigbird_lists, hashed, random_blocks
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["BigBirdAttention", "BigBirdConfig"]

logger = logging.getLogger(__name__)

ETC_REFUSAL = "form='etc' is for encoders: its global tokens read the future too. Allowed here: form='itc'."


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
        self.require_choice("form", ("itc", "etc"))
        self.require_integer("block_size", "num_window_blocks")
        self.require_integer("num_random_blocks", "seed", at_least=0)
        self.require_width("num_global_tokens", optional=True)
        if self.form == "itc" and self.num_global_tokens is not None:
            given = self.num_global_tokens
            raise ValueError(f"num_global_tokens={given!r}; allowed: None with form='itc' (it goes with form='etc').")
        if self.num_window_blocks % 2 == 0:
            raise ValueError(f"num_window_blocks={self.num_window_blocks}; allowed: an odd integer, half on each side.")


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
    guide=("local-global", "long documents on encoders, where no token is to be named as the one that stands for all"),
    state="kv",
    kernel="block_sparse",
    exact_limit=_exact_limit,
    test_options=(
        {"block_size": 4},
        {"block_size": 8, "num_window_blocks": 1, "num_random_blocks": 1, "seed": 7},
        {"block_size": 4, "form": "etc", "num_global_tokens": 3},
    ),
    masked_export=True,
)
class BigBirdAttention(AttentionVariant):
    """Block-sparse attention of one layer. Blocks are counted by rank among the real tokens."""

    config: BigBirdConfig
    codes: torch.Tensor
    global_shift: torch.Tensor

    def __init__(self, config: BigBirdConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        if config.form == "etc" and context.is_causal:
            raise ValueError(ETC_REFUSAL)
        self.seed = config.seed * 1_000_003 + context.layer_idx
        self.num_global_tokens = (config.num_global_tokens or 32) if config.form == "etc" else 0
        # A number per head from which its random blocks are drawn, saved with the weights.
        self.register_buffer("codes", torch.zeros(context.num_heads, dtype=torch.long))
        if self.num_global_tokens:
            shape = (context.num_heads, 2, self.num_global_tokens, context.head_dim)
            self.global_tokens = nn.Parameter(torch.empty(shape))  # queries and keys
            self.register_buffer("global_shift", torch.empty(context.num_heads))  # c
        self.reset_parameters()

    def _generator(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(self.seed)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        heads = torch.arange(self.context.num_heads, device="cpu")
        self.codes.copy_(hashed(hashed(torch.tensor(self.seed, device="cpu")) + heads))
        if self.num_global_tokens:
            noise = torch.randn(self.global_tokens.shape, generator=self._generator(), device="cpu")
            self.global_tokens.copy_(0.02 * noise)
            self.global_shift.fill_(-math.log(self.num_global_tokens))  # together they weigh as one token

    @torch.no_grad()
    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Global tokens start as the queries and keys of random embeddings, N(0, 0.02)."""
        if self.num_global_tokens:
            shape = (self.num_global_tokens, query[0].shape[1])
            embeddings = 0.02 * torch.randn(shape, generator=self._generator(), device="cpu").to(query[0])
            both = torch.stack([nn.functional.linear(embeddings, weight, bias) for weight, bias in (query, key)])
            self.global_tokens.copy_(both.unflatten(-1, (self.context.num_heads, -1)).permute(2, 0, 1, 3))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Per head: no change, the mean first token ([CLS]) plus noise, or real tokens of several weights e^c."""
        rows = collect_rows(batches)
        if not self.num_global_tokens or not rows:
            return
        real = torch.cat([torch.stack(row[:2])[:, 0] for row in rows], dim=2).transpose(0, 1)  # [H, 2, N, D]
        first = torch.stack([torch.stack(row[:2])[:, 0, :, :1] for row in rows]).mean(0).transpose(0, 1)
        generator = self._generator()
        noise = torch.randn(self.global_tokens.shape, generator=generator, device="cpu").to(first)
        places = torch.randint(real.shape[2], (self.num_global_tokens,), generator=generator, device="cpu")
        starts = [{}, {"tokens": first + 0.1 * first.std(-1, keepdim=True) * noise}]
        for shift in (0.0, 1.5, 3.0):
            starts.append({"tokens": real[:, :, places], "shift": torch.full_like(self.global_shift, shift)})
        present = {"tokens": self.global_tokens, "shift": self.global_shift}
        choose_start(present, starts, self.error_meter(rows, batches[0].scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def full_blocks(self) -> int:
        """Sequences of so many blocks are covered by the pattern: the attention is softmax attention."""
        return self.config.num_random_blocks + self.config.num_window_blocks // 2 + 3 - self.context.is_causal

    def random_blocks(self, row: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The random blocks of query blocks `row` in sequences of `blocks` blocks; see the op of this name."""
        number, window = self.config.num_random_blocks, self.config.num_window_blocks
        given: dict[str, Any] = {"num_window_blocks": window, "is_causal": self.context.is_causal}
        return random_blocks(row, blocks, codes=self.codes, number=number, **given)

    def lists(self, grid: BlockGrid) -> BlockLists:
        """The key blocks of each query block of a grid."""
        drawn = self.random_blocks(grid.row, grid.blocks)
        return bigbird_lists(grid.row, grid.blocks, drawn, self.config.num_window_blocks, self.context.is_causal)

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        k_len, scaling, limit = call.k.shape[2], inputs.scaling, self.full_blocks() * self.config.block_size
        aligned = inputs.token_mask is None and state is None and inputs.query.shape[2] == k_len
        if not (is_exported() or self.num_global_tokens) and k_len <= limit:  # nothing is remembered
            if not torch.compiler.is_compiling():
                _note_full(limit)
            where: dict[str, Any] = {"left": k_len, "right": 0 if inputs.is_causal else k_len, "backend": self.backend}
            where |= {"key_allowed": None if aligned else call.rank >= 0, "scaling": scaling}
            out = sliding_window_attention(call.q, call.k, call.v, **where)
        else:
            grid, extra, kept_as = block_grid(call, self.config.block_size, aligned=aligned), None, None
            if self.num_global_tokens:
                extra = global_columns(call, self.global_tokens, self.global_shift, scaling)
            if aligned and not torch.compiler.is_compiling() and not self.codes.is_inference():
                kept_as = "bigbird", self.config, inputs.is_causal, WeakIdRef(self.codes), self.codes._version
            given: dict[str, Any] = {"extra": extra, "kept_as": kept_as, "backend": self.backend}
            out = block_sparse_attention(call, grid, functools.partial(self.lists, grid), scaling=scaling, **given)
        return call.restore(out), None if state is None else kv_state_after(call)
