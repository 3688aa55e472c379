"""Long-Short Transformer: a window plus landmarks of the whole sequence in one softmax (arXiv:2107.02192).

    y = softmax([s q K_window^T ; s q Kbar^T + b]) [V_window ; Vbar],  Kbar = P^T K, Vbar = P^T V,
    P = softmax over positions of K W_p

Encoders pool all tokens into r landmarks; decoders each segment of c tokens into r, and a query sees the segments
that ended before its own: cost n (w + r) d, on decoders n (w + n r / c) d, state r / c landmarks a token besides
the window. b = H(P) - log r, log(n / r) for equal weights: landmarks stand for as many tokens as they pool.

With calibration W_p is s times r centroids of the head's queries, so that P estimates how they weigh the keys, or
on encoders s times their mean, each landmark pooling a segment of n / r tokens: what lowers the head's error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_linear_attn.ops.base.backend import use_triton
from hf_linear_attn.ops.base.compaction import compact, init_count, window_state_after
from hf_linear_attn.ops.pooled import landmarks as landmark
from hf_linear_attn.ops.starts.calibration import choose_start, collect_rows, head_tokens, kmeans
from hf_linear_attn.ops.window.attention import sliding_window_attention
from hf_linear_attn.registry import register_variant
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant, LayerContext, State, VariantConfig

__all__ = ["LongShortAttention", "LongShortConfig"]


@dataclass(frozen=True)
class LongShortConfig(VariantConfig):
    """Options of `long_short`.

    Attributes:
        window_size: w in tokens; even on encoders, half on each side.
        num_landmarks: r, of the sequence on encoders, of each segment on decoders; None means 32 and 1, 0 none.
        segment_size: c in tokens, at most window_size, for decoders only; None means 16.
        landmark_bias: start of a learned number per head that is added to b.
        norm_gate: start of the gate a of DualLN, x + a (LN(x) - x) on the keys and values of the window and of the
            landmarks: 1 is the paper's, which no checkpoint was trained for; None for no LayerNorm at all.
        seed: of the noise that W_p starts with, and of the centroids.
    """

    window_size: int = 128
    num_landmarks: int | None = None
    segment_size: int | None = None
    landmark_bias: float = 0.0
    norm_gate: float | None = 0.0
    seed: int = 0

    def validate(self) -> None:
        self.require_integer("window_size")
        self.require_width("num_landmarks", at_least=0, optional=True)
        self.require_integer("segment_size", optional=True)
        self.require_integer("seed", at_least=0)
        self.require_number("landmark_bias")
        self.require_number("norm_gate", optional=True)


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"window_size": length if is_causal else max(2, 2 * (length - 1)), "num_landmarks": 0}


@register_variant(
    "long_short",
    config=LongShortConfig,
    title="Long-Short Transformer",
    paper="Long-Short Transformer: Efficient Transformers for Language and Vision, arXiv:2107.02192",
    cost="n (w + r) d",
    guide=("local-global", "close to softmax at once: near keys as they are, far ones in few slots"),
    state="kv",
    kernel="block_sparse",
    kernel_sides=("encoder",),
    quadratic="decoder: n^2 r / c time, over the landmarks of past segments",
    exact_limit=_exact_limit,
    test_options=(
        {"window_size": 8, "num_landmarks": 5},
        {"window_size": 6, "num_landmarks": 2, "segment_size": 4, "norm_gate": 1.0, "landmark_bias": -1.0},
        {"window_size": 4, "num_landmarks": 0, "norm_gate": None},
    ),
    masked_export=True,
)
class LongShortAttention(AttentionVariant):
    """Window and landmarks of one layer; see `LongShortConfig`. Position means rank among the real tokens.

    Parameters: `projection [H, D, r]` (W_p), `landmark_bias [H]`, and the gate, weight and bias of `window_norm` and
    `landmark_norm`. Buffer (persistent): `segmented [H]`, whether a head's landmarks pool a segment each.

    Raises:
        ValueError: for an odd window or a segment_size on an encoder, or a segment longer than the window.
    """

    segmented: torch.Tensor

    def __init__(self, config: LongShortConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        r, c, w = config.num_landmarks, config.segment_size, config.window_size
        self.r = r if r is not None else 1 if context.is_causal else 32
        self.c = 16 if c is None else c
        if not context.is_causal and (w % 2 or c is not None):
            given = f"window_size={w} and segment_size={c} on an encoder"
            raise ValueError(f"{given}; allowed: an even window (half on each side) and segment_size=None.")
        if context.is_causal and self.r and self.c > w:
            raise ValueError(f"segment_size={self.c} leaves tokens unseen; allowed: at most window_size={w}.")
        heads, dim, norms = context.num_heads, context.head_dim, config.norm_gate is not None
        self.window_norm = landmark.GatedNorm(heads, dim) if norms else nn.Identity()
        self.landmark_norm = landmark.GatedNorm(heads, dim) if norms and self.r else nn.Identity()
        if self.r:
            self.projection = nn.Parameter(torch.empty(heads, dim, self.r))
            self.landmark_bias = nn.Parameter(torch.empty(heads))
            self.register_buffer("segmented", torch.empty(heads, dtype=torch.bool))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Noise in W_p (equal landmarks would stay equal), gates and biases as the options say."""
        for norm in (self.window_norm, self.landmark_norm):
            if isinstance(norm, landmark.GatedNorm):
                norm.reset_parameters(self.config.norm_gate)
        if self.r:
            generator = self.context.generator(self.config.seed)
            self.projection.copy_(0.02 * torch.randn(self.projection.shape, generator=generator, device="cpu"))
            self.landmark_bias.fill_(self.config.landmark_bias)
            self.segmented.fill_(False)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's W_p, and whether its landmarks pool segments, by its output error on these inputs."""
        if not self.r:
            return
        rows, scaling = collect_rows(batches), batches[0].scaling
        queries, _ = head_tokens(rows)
        centroids = scaling * kmeans(queries, self.r, self.config.seed).mT
        no, yes = (torch.full_like(self.segmented, segmented) for segmented in (False, True))
        starts = [{"projection": start, "segmented": no} for start in (self.projection.clone(), centroids)]
        if not self.context.is_causal and queries.shape[1] >= 2 * self.r * len(rows):  # of one token they say nothing
            mean = scaling * queries.mean(1)[..., None].expand_as(centroids)
            starts.append({"projection": mean, "segmented": yes})
        present = {"projection": self.projection, "segmented": self.segmented}
        choose_start(present, starts, self.error_meter(rows, scaling))

    def drop_linear_branch(self) -> bool:
        had, self.r = bool(self.r), 0
        return had

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim

        def empty(length: int, width: int) -> torch.Tensor:
            return torch.zeros(batch_size, heads, length, width, dtype=dtype, device=device)

        state = {name: empty(self.config.window_size - 1, dim) for name in ("key", "value")}
        if self.r:
            state |= {"landmark_key": empty(0, dim + 1), "landmark_value": empty(0, dim)}
        return {**state, "count": init_count(batch_size, device)}

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        if inputs.is_causal != self.context.is_causal:
            raise ValueError(f"Layer built for is_causal={self.context.is_causal}, called with {inputs.is_causal}.")
        if state is not None and (not inputs.is_causal or inputs.query.shape[2] != inputs.key.shape[2]):
            shapes = f"is_causal={inputs.is_causal}, Tq={inputs.query.shape[2]}, Tk={inputs.key.shape[2]}"
            raise ValueError(f"A decode state needs causal attention and Tq == Tk (new tokens), got {shapes}.")
        past = None if state is None else (state["key"], state["value"], state["count"])
        call, w = compact(inputs.query, inputs.key, inputs.value, inputs.token_mask, past), self.config.window_size
        left, right = (w - 1, 0) if inputs.is_causal else (w // 2, w // 2)
        window: dict[str, Any] = {"left": left, "right": right, "key_allowed": call.real, "scaling": inputs.scaling}
        window["backend"] = self.backend
        q, k = call.q, self.window_norm(call.k)
        v = k if call.v is call.k else self.window_norm(call.v)
        after: State = {}
        if state is not None and not self.r:
            after = window_state_after(call, w - 1, state["key"].dtype)
        if self.r and inputs.is_causal:
            q, k, v = landmark.with_channel(q, 1.0), landmark.with_channel(k, 0.0), landmark.with_channel(v, 0.0)
            use_triton(self.backend, call.q, "there is no kernel for the segments of long_short")
            sizes = {"segment_size": self.c, "window_size": w}
            pooled, after = landmark.pool_segments(call, self.projection, state=state, **sizes)
            marks = self._landmarks(*pooled, inputs.scaling)
            sizes |= {"per_segment": self.r, "from_start": state is None}
            output = landmark.attend_window_and_segments(q, k, v, call.rank, marks, scaling=inputs.scaling, **sizes)
        elif self.r:
            pooled, seen = landmark.pool_sequence(call.k, call.v, call.rank, self.projection, self.segmented)
            extra = (*self._landmarks(*pooled, inputs.scaling), seen[:, None])
            output = sliding_window_attention(q, k, v, extra=extra, **window)
        else:
            output = sliding_window_attention(q, k, v, **window)
        output = call.restore(output[..., : self.context.head_dim])
        return output, None if state is None else after

    def _landmarks(
        self, k: torch.Tensor, v: torch.Tensor, lack: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed keys with their bias as one more channel, and values: `[B, H, landmarks, D + 1]`."""
        bias = (lack + self.landmark_bias[:, None]) / scaling
        return landmark.with_channel(self.landmark_norm(k), bias), landmark.with_channel(self.landmark_norm(v), 0.0)
