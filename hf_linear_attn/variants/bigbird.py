"""BigBird (arXiv:2007.14062): blocks of a window, global blocks and random blocks.

ITC: a query sees the w blocks around its own, the first and the last block, and r random blocks of its head;
queries of the first and the last block see everything. Causal: its own block and w // 2 before it, the first block,
r random ones from the past. Cost O(n (w + 2 + r) b) per head.

ETC adds g global tokens: y_i = softmax([s q_i k_g + c ; s q_i k_S]) [v_g ; v_S]. As in the paper they travel through
the layers beside the text and read all of it and one another (`form="etc_traveling"`), or each layer has q_g and k_g of
its own, and v_g is what a global token reads there, softmax(s q_g K^T) V (`form="etc"`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdRef

from hf_linear_attn.ops.base.compaction import compact, init_kv_state, kv_state_after
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.sparse import global_tokens
from hf_linear_attn.ops.sparse.attention import BlockGrid, block_sparse_attention
from hf_linear_attn.ops.sparse.patterns import BlockLists, bigbird_lists, hashed, random_blocks
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, recorded_meter
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["BigBirdAttention", "BigBirdConfig"]

logger = logging.getLogger(__name__)

ETC_REFUSAL = "form={!r} is for encoders: its global tokens read the future too. Allowed here: form='itc'."


@dataclass(frozen=True)
class BigBirdConfig(VariantConfig):
    """Options of `bigbird`.

    Attributes:
        block_size: b, in tokens.
        num_window_blocks: w, odd; half of the others on each side, on decoders only the past half.
        num_random_blocks: r, for each block of queries and head; None means 3, and 0 with `form="etc_traveling"`.
        seed: of the random blocks and of the start of the global tokens.
        form: `"itc"`; on encoders `"etc_traveling"`, tokens beside the text, or `"etc"`, where each layer has its own.
        num_global_tokens: g of both forms of ETC; None means 32.
    """

    block_size: int = 64
    num_window_blocks: int = 3
    num_random_blocks: int | None = None
    seed: int = 0
    form: str = "itc"
    num_global_tokens: int | None = None

    def validate(self) -> None:
        self.require_choice("form", ("itc", "etc", "etc_traveling"))
        self.require_integer("block_size", "num_window_blocks")
        self.require_integer("num_random_blocks", at_least=0, optional=True)
        self.require_integer("seed", at_least=0)
        self.require_width("num_global_tokens", optional=True)
        if self.form == "itc" and self.num_global_tokens is not None:
            raise ValueError(f"num_global_tokens={self.num_global_tokens}; allowed: None with form='itc'.")
        if self.num_window_blocks % 2 == 0:
            raise ValueError(f"num_window_blocks={self.num_window_blocks}; allowed: an odd integer, half on each side.")


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
    exact_limit=lambda length, is_causal: {"block_size": -(-length // (6 if is_causal else 7))},
    test_options=(
        {"block_size": 4},
        {"block_size": 8, "num_window_blocks": 1, "num_random_blocks": 1, "seed": 7},
        {"block_size": 4, "form": "etc", "num_global_tokens": 3},
        {"block_size": 4, "form": "etc_traveling", "num_global_tokens": 3},
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
        if config.form != "itc" and context.is_causal:
            raise ValueError(ETC_REFUSAL.format(config.form))
        self.seed = config.seed * 1_000_003 + context.layer_idx
        random = config.num_random_blocks
        self.num_random_blocks = random if random is not None else 0 if config.form == "etc_traveling" else 3
        number = 0 if config.form == "itc" else config.num_global_tokens or 32
        self.num_global_tokens, self.num_extra_tokens = (number, 0) if config.form == "etc" else (0, number)
        # A number per head from which its random blocks are drawn, saved with the weights.
        self.register_buffer("codes", torch.zeros(context.num_heads, dtype=torch.long))
        if self.num_global_tokens:
            self.global_tokens = nn.Parameter(torch.empty(context.num_heads, 2, number, context.head_dim))  # q, k
        if number:
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
        elif number := self.num_extra_tokens:
            self.global_shift.copy_(global_tokens.traveling_starts(number, self.global_shift)[0]["shift"])

    @torch.no_grad()
    def load_projections(
        self,
        query: tuple[torch.Tensor, torch.Tensor | None],
        key: tuple[torch.Tensor, torch.Tensor | None],
        value: tuple[torch.Tensor, torch.Tensor | None],
    ) -> None:
        """Global tokens start as the queries and keys of random embeddings, N(0, 0.02)."""
        if number := self.num_global_tokens:
            given = number, query, key, self.context.num_heads, self._generator()
            self.global_tokens.copy_(global_tokens.projected_embeddings(*given))

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Per head, the nearest start to softmax; of tokens that travel only their weight e^c is chosen."""
        if self.num_extra_tokens and all(call.extra is not None for call in batches):
            starts = global_tokens.traveling_starts(self.num_extra_tokens, self.global_shift)
            choose_start({"shift": self.global_shift}, starts, recorded_meter(self, batches))
        elif self.num_global_tokens and (rows := collect_rows(batches)):
            present = {"tokens": self.global_tokens, "shift": self.global_shift}
            starts = global_tokens.column_starts(rows, **present, generator=self._generator())
            choose_start(present, starts, self.error_meter(rows, batches[0].scaling))

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        return init_kv_state(batch_size, self.context.num_heads, self.context.head_dim, dtype, device)

    def full_blocks(self) -> int:
        """Sequences of so many blocks are covered by the pattern: the attention is softmax attention."""
        return self.num_random_blocks + self.config.num_window_blocks // 2 + 3 - self.context.is_causal

    def random_blocks(self, row: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The random blocks of query blocks `row` in sequences of `blocks` blocks; see the op of this name."""
        given: dict[str, Any] = {"number": self.num_random_blocks, "is_causal": self.context.is_causal}
        return random_blocks(row, blocks, codes=self.codes, num_window_blocks=self.config.num_window_blocks, **given)

    def lists(self, grid: BlockGrid) -> BlockLists:
        """The key blocks of each query block of a grid."""
        drawn = self.random_blocks(grid.row, grid.blocks)
        found = bigbird_lists(grid.row, grid.blocks, drawn, self.config.num_window_blocks, self.context.is_causal)
        return replace(found, full_rows=None) if self.num_extra_tokens else found

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past)
        k_len, scaling, limit = call.k.shape[2], inputs.scaling, self.full_blocks() * self.config.block_size
        aligned = inputs.token_mask is None and state is None and inputs.query.shape[2] == k_len
        if not (is_exported() or self.num_global_tokens or inputs.extra is not None) and k_len <= limit:  # stateless
            if not torch.compiler.is_compiling():
                _note_full(limit)
            where: dict[str, Any] = {"left": k_len, "right": 0 if inputs.is_causal else k_len, "backend": self.backend}
            where |= {"key_allowed": call.real, "scaling": scaling}
            out = sliding_window_attention(call.q, call.k, call.v, **where)
        else:
            grid, extra, kept_as = BlockGrid(call, self.config.block_size, aligned=aligned), None, None
            if self.num_global_tokens:
                extra = global_tokens.global_columns(call, self.global_tokens, self.global_shift, scaling)
            elif inputs.extra is not None:
                extra = global_tokens.traveling_columns(inputs.extra, self.global_shift)
            if (aligned or call.real is None) and not torch.compiler.is_compiling() and not self.codes.is_inference():
                kept_as = "bigbird", self.config, inputs.is_causal, WeakIdRef(self.codes), self.codes._version
            given: dict[str, Any] = {"extra": extra, "kept_as": kept_as, "backend": self.backend}
            out = block_sparse_attention(call, grid, functools.partial(self.lists, grid), scaling=scaling, **given)
            if self.num_extra_tokens:
                out = global_tokens.place_end_rows(out, call, self.config.block_size, extra, scaling)
        return call.restore(out), None if state is None else kv_state_after(call)
