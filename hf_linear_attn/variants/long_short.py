"""Long-Short Transformer: a window plus landmarks of the whole sequence in one softmax (arXiv:2107.02192).

    y = softmax([s q K_window^T ; s q Kbar^T + b]) [V_window ; Vbar],  Kbar = P^T K, Vbar = P^T V,
    P = softmax over positions of K W_p

Encoders pool all tokens into r landmarks; decoders each segment of c tokens into r, and a query sees the segments
that ended before its own. Cost n (w + r) d; on decoders n (w + n r / c) d, and the state grows by r / c landmarks a
token. b = H(P) - log r, which is log(n / r) for equal weights: the landmarks stand for as many tokens as they pool.

With calibration W_p is s times the head's mean query, so that P estimates how its queries weigh the keys; encoder
heads may pool segments of n / r tokens with it, or have W_p = s times r centroids of queries. Each head keeps what
lowers its error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.ops import dynamic_projection as landmark
from hf_linear_attn.ops.calibration import Row, choose_per_head, head_errors, kmeans, real_rows
from hf_linear_attn.ops.compaction import CompactedCall, compact, init_kv_state
from hf_linear_attn.ops.pooling import even_segment_starts, segment_of_rank
from hf_linear_attn.ops.sliding_window import sliding_window_attention
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
        for name, least in (("window_size", 1), ("num_landmarks", 0), ("segment_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is None and name in ("num_landmarks", "segment_size"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}; allowed: an integer of at least {least}.")
        for name in ("landmark_bias", "norm_gate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) and (name, value) != ("norm_gate", None):
                raise ValueError(f"{name}={value!r}; allowed: a number{', or None' * (name == 'norm_gate')}.")


def _exact_limit(length: int, is_causal: bool) -> dict[str, Any]:
    return {"window_size": length if is_causal else max(2, 2 * (length - 1)), "num_landmarks": 0}


@register_variant(
    "long_short",
    config=LongShortConfig,
    title="Long-Short Transformer",
    paper="Long-Short Transformer: Efficient Transformers for Language and Vision, arXiv:2107.02192",
    cost="n (w + r) d",
    state="kv",
    quadratic="decoder: n^2 r / c time, over the landmarks of past segments",
    exact_limit=_exact_limit,
    test_options=(
        {"window_size": 8, "num_landmarks": 5},
        {"window_size": 6, "num_landmarks": 2, "segment_size": 4, "norm_gate": 1.0, "landmark_bias": -1.0},
        {"window_size": 4, "num_landmarks": 0, "norm_gate": None},
    ),
)
class LongShortAttention(AttentionVariant):
    """Window and landmarks of one layer; see `LongShortConfig`.

    Parameters: `projection [H, D, r]` (W_p), `landmark_bias [H]`, and for each of `window` and `landmark` the
    `_gate [H]`, `_norm_weight` and `_norm_bias` `[H, D]`. Buffer (persistent): `segmented [H]`, whether a
    head's landmarks pool a segment each (encoders). Position means rank among the real tokens.

    Raises:
        ValueError: for an odd window or a segment_size on an encoder, a segment longer than the window.
    """

    segmented: torch.Tensor

    def __init__(self, config: LongShortConfig, context: LayerContext) -> None:
        super().__init__(config, context)
        r, c, w = config.num_landmarks, config.segment_size, config.window_size
        self.r = r if r is not None else 1 if context.is_causal else 32
        self.c = 16 if c is None else c
        if not context.is_causal and (w % 2 or c is not None):
            allowed = "an even window_size (half on each side) and segment_size=None on an encoder"
            raise ValueError(f"window_size={w} and segment_size={c}; allowed: {allowed}.")
        if context.is_causal and self.r and self.c > w:
            raise ValueError(f"segment_size={self.c} leaves tokens unseen; allowed: at most window_size={w}.")
        heads, dim = context.num_heads, context.head_dim
        if self.r:
            self.projection = nn.Parameter(torch.empty(heads, dim, self.r))
            self.landmark_bias = nn.Parameter(torch.empty(heads))
            self.register_buffer("segmented", torch.empty(heads, dtype=torch.bool))
        for part in ("window", "landmark")[: 1 + bool(self.r)] if config.norm_gate is not None else ():
            self.register_parameter(f"{part}_gate", nn.Parameter(torch.empty(heads)))
            self.register_parameter(f"{part}_norm_weight", nn.Parameter(torch.empty(heads, dim)))
            self.register_parameter(f"{part}_norm_bias", nn.Parameter(torch.empty(heads, dim)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Noise in W_p (equal landmarks would stay equal), gates and biases as the options say."""
        for name, parameter in self.named_parameters():
            if name == "projection":
                generator = torch.Generator("cpu").manual_seed(self.config.seed * 100_003 + self.context.layer_idx)
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator, device="cpu"))
            elif name == "landmark_bias":
                parameter.fill_(self.config.landmark_bias)
            else:
                parameter.fill_(self.config.norm_gate if name.endswith("_gate") else float(name.endswith("_weight")))
        if self.r:
            self.segmented.fill_(False)

    @torch.no_grad()
    def calibrate(self, batches: Sequence[AttentionInputs]) -> None:
        """Choose each head's W_p, and whether its landmarks pool segments, by its output error on these inputs."""
        if not self.r:
            return
        rows, scaling, causal = [], batches[0].scaling, self.context.is_causal
        for batch in batches:
            rows += real_rows(batch.query, batch.key, batch.value, batch.key_padding)
        queries = torch.cat([row[0][0] for row in rows], 1)  # [H, tokens, D]
        centroids = scaling * kmeans(queries, self.r, self.config.seed).mT
        mean = scaling * queries.mean(1)[..., None].expand_as(centroids)
        starts = [(self.projection.float().clone(), False), (centroids, False)]
        if not causal:
            starts.append((mean, True))

        def attend(row: Row) -> torch.Tensor:
            return self(AttentionInputs(*row, is_causal=causal, scaling=scaling))[0]

        errors = []
        for projection, segmented in starts:
            self.projection.copy_(projection)
            self.segmented.fill_(segmented)
            errors.append(head_errors(attend, rows, is_causal=causal, scaling=scaling))
        choice, heads = choose_per_head(errors), torch.arange(len(queries), device=queries.device)
        self.projection.copy_(torch.stack([projection for projection, _ in starts])[choice, heads])
        self.segmented.copy_(torch.tensor([segmented for _, segmented in starts], device=choice.device)[choice])

    def init_state(self, batch_size: int, dtype: torch.dtype, device: torch.device) -> State:
        heads, dim = self.context.num_heads, self.context.head_dim
        state = init_kv_state(batch_size, heads, dim, dtype, device)
        for name in ("key", "value"):
            state[name] = state[name].new_zeros(batch_size, heads, self.config.window_size - 1, dim)
            if self.r:
                state[f"landmark_{name}"] = state[name].new_zeros(batch_size, heads, 0, dim + 1)
        return state

    def forward(self, inputs: AttentionInputs, state: State | None = None) -> tuple[torch.Tensor, State | None]:
        if inputs.is_causal != self.context.is_causal:
            raise ValueError(f"Layer built for is_causal={self.context.is_causal}, called with {inputs.is_causal}.")
        if state is not None and (not inputs.is_causal or inputs.query.shape[2] != inputs.key.shape[2]):
            shapes = f"is_causal={inputs.is_causal}, Tq={inputs.query.shape[2]}, Tk={inputs.key.shape[2]}"
            raise ValueError(f"A decode state needs causal attention and Tq == Tk (new tokens), got {shapes}.")
        past = None if state is None else (state["key"], state["value"], state["count"])
        call = compact(inputs.query, inputs.key, inputs.value, inputs.key_padding, past)
        attend = self._attend_causal if inputs.is_causal else self._attend_bidirectional
        output, after = attend(call, inputs.scaling, state)
        return call.restore(output).to(inputs.query.dtype), after

    def _attend_bidirectional(
        self, call: CompactedCall, scaling: float, state: None
    ) -> tuple[torch.Tensor, State | None]:
        half = self.config.window_size // 2
        window: dict[str, Any] = {"left": half, "right": half, "scaling": scaling}
        if call.perm is not None:
            window["key_allowed"] = call.rank >= 0
        k, v = self._normed(call.k, "window"), self._normed(call.v, "window")
        if not self.r:
            return sliding_window_attention(call.q, k, v, **window), None
        n_real, landmarks = call.rank[:, -1] + 1, torch.arange(self.r, device=k.device)
        rank = call.rank.masked_fill(call.rank < 0, k.shape[2])
        segment = segment_of_rank(even_segment_starts(n_real, self.r), k.shape[2], rank)
        allowed = (segment[:, None, :, None] == landmarks) | ~self.segmented[:, None, None]
        pooled = landmark.pool_landmarks(call.k, call.v, self.projection, allowed & (call.rank >= 0)[:, None, :, None])
        used = n_real.clamp(1, self.r)[:, None]  # [B, 1]
        shared = torch.where(self.segmented, 0.0, used.log())  # [B, H]
        extra = (*self._landmarks(*pooled, shared, scaling), (landmarks < used)[:, None])
        q, k, v = (landmark.with_channel(x, float(i == 0)) for i, x in enumerate((call.q, k, v)))
        return sliding_window_attention(q, k, v, extra=extra, **window)[..., :-1], None

    def _attend_causal(
        self, call: CompactedCall, scaling: float, state: State | None
    ) -> tuple[torch.Tensor, State | None]:
        w, c, new = self.config.window_size, self.c, call.q.shape[2]
        k, v = self._normed(call.k, "window"), self._normed(call.v, "window")
        if not self.r:
            in_window = None if call.perm is None and state is None else call.rank >= 0
            left: dict[str, Any] = {"left": w - 1, "right": 0, "scaling": scaling, "key_allowed": in_window}
            after = None if state is None else _window_state(call, w - 1)
            return sliding_window_attention(call.q, k, v, **left), after
        # Calls before left a window of w - 1 tokens and as many more as there were since the last multiple of c.
        # Their padding counts: a number that every row agrees on without being read from the device.
        count = call.k.shape[2] // c if state is None else (c - 1 + new) // c
        slots = count
        first = call.past.div(c, rounding_mode="floor")
        pooled = landmark.pool_segments(call.k, call.v, call.rank, self.projection, first, count, c)
        marks = self._landmarks(*pooled, torch.tensor(math.log(self.r), device=k.device), scaling)
        after = None
        if state is not None:
            since = state["key"].shape[2] - (w - 1) + new
            slots = state["landmark_key"].shape[2] // self.r + since // c
            marks = tuple(
                landmark.merge_segments(state[f"landmark_{name}"].to(x.dtype), x, first, slots, self.r)
                for name, x in zip(("key", "value"), marks, strict=True)
            )
            after = _window_state(call, w - 1 + since % c)
            after.update(landmark_key=marks[0].to(state["key"].dtype), landmark_value=marks[1].to(state["key"].dtype))
        q, k, v = (landmark.with_channel(x, float(i == 0)) for i, x in enumerate((call.q, k, v)))
        where: dict[str, Any] = {"window_size": w, "segment_size": c, "per_segment": self.r, "scaling": scaling}
        output = landmark.attend_window_and_segments(q, k, v, call.rank, marks, from_start=state is None, **where)
        return output[..., :-1], after

    def _landmarks(
        self, k: torch.Tensor, v: torch.Tensor, entropy: torch.Tensor, shared: torch.Tensor, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys with the bias as their last channel, and values: `[B, H, landmarks, D + 1]`."""
        bias = (entropy - shared[..., None] + self.landmark_bias[:, None]) / scaling
        k, v = self._normed(k, "landmark"), self._normed(v, "landmark")
        return landmark.with_channel(k, bias), landmark.with_channel(v, 0.0)

    def _normed(self, x: torch.Tensor, part: str) -> torch.Tensor:
        """DualLN of `x` `[B, H, T, D]`, mixed in by its gate."""
        if self.config.norm_gate is None:
            return x
        gate, weight, bias = (
            getattr(self, f"{part}_{name}").to(x.dtype) for name in ("gate", "norm_weight", "norm_bias")
        )
        normed = F.layer_norm(x, x.shape[-1:]) * weight[:, None] + bias[:, None]
        return torch.lerp(x, normed.to(x.dtype), gate[:, None, None])


def _window_state(call: CompactedCall, size: int) -> State:
    """The last `size` keys and values as they came, and the count of tokens."""
    start, batch = call.k.shape[2] - size, call.k.shape[0]
    return {
        "key": call.k[:, :, start:].contiguous(),
        "value": call.v[:, :, start:].contiguous(),
        "count": (call.rank[:, -1] + 1).expand(batch).contiguous(),
    }
