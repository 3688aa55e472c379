"""What the forms of linear attention share: one call and its blocks of tokens, the state, the sizes of blocks.

Shapes are those of `ops.linear.attention`. What a block gives has the dtype of the sums, float32 or float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_linear_attn.ops.base.masking import safe_masked_fill
from hf_linear_attn.ops.base.numerics import LOG_ZERO, accumulation_dtype
from hf_linear_attn.ops.features.maps import Features

__all__ = ["CHUNK", "Call", "Keys", "LogDecay", "Options", "State", "block_size", "relative_to_peaks"]

# {"kv": [B, H, F, D], "z": [B, H, F], "log_scale": [B, H]}: sums over past keys / exp(log_scale). "kv" alone without a
# normalizer.
State = dict[str, torch.Tensor]

CHUNK = 64  # tokens per causal chunk, a power of two
# Tokens x heads x batch whose features are held at once: small enough for a CPU cache, which at long lengths
# is nearly twice as fast as whole sequences, and keeps memory small.
_CPU_BLOCK_ROWS = 6144
_BLOCK_ROWS = 1 << 19
_MIN_BLOCK = 256

_LEAST_DECAY = -1e4  # log-decay in place of -inf: finite, so that sums and differences are numbers

_Tensors = tuple[torch.Tensor, ...]


def block_size(v: torch.Tensor) -> int:
    """Tokens of a block, whole chunks."""
    rows = _CPU_BLOCK_ROWS if v.device.type == "cpu" else _BLOCK_ROWS
    return max(_MIN_BLOCK, rows // (v.shape[0] * v.shape[1]) // CHUNK * CHUNK)


@dataclass(eq=False)  # not frozen, for the reason that `features.maps` gives
class LogDecay:
    """Log-decays computed from tokens, a block of them at a time.

    Attributes:
        function: `(tokens, *parameters) -> [B, H, T, F]`, or `[B, H, T, 1]` where all features decay alike.
        tokens: `[B, H or 1, T, X]`; what stands at padded tokens has no effect.
        parameters: every tensor of `function` that trains.
    """

    function: Callable[..., torch.Tensor]
    tokens: torch.Tensor
    parameters: tuple[torch.Tensor, ...] = ()

    def __call__(self, token_mask: torch.Tensor | None) -> torch.Tensor:
        """The log-decays of all tokens."""
        return self.function(safe_masked_fill(self.tokens, token_mask), *self.parameters)


class Options(NamedTuple):
    """What a call is besides its tensors.

    Attributes:
        q_map, k_map: feature maps, of tokens and the parameters that follow them.
        decay: function of a `LogDecay`, or None.
        counts: how many of the parameters `q_map` takes, and `k_map`; the decay has the rest.
        is_causal: whether query row r sees keys up to position Tk - Tq + r only.
        normalized: whether there are denominators.
        divided: whether outputs are divided by them; else they stand beside the numerators, as the last column.
        own: whether a row counts its own key; False needs decay.
    """

    q_map: Callable[..., Features]
    k_map: Callable[..., Features]
    decay: Callable[..., torch.Tensor] | None
    counts: tuple[int, int]
    is_causal: bool
    normalized: bool
    divided: bool = True
    own: bool = True


class Keys(NamedTuple):
    """A block of keys.

    Attributes:
        features: `[B, H, T, F]`.
        log_weight: `[B, H, T]`, without regard to padding; None for weight 1.
        decay: log-decays `[B, H, T, F or 1]`, 0 at padded tokens; None for none.
    """

    features: torch.Tensor
    log_weight: torch.Tensor | None
    decay: torch.Tensor | None


class Call:
    """One call: its options, and the tensors that every block takes a slice of.

    Attributes:
        q: `[B, H, Tq, D]`; k, v: `[B, H, Tk, D]`.
        log_weight: `[B, H, Tk]`, added to that of the keys' map, or None.
        decay_tokens: those of a `LogDecay`, or None.
        token_mask, query_mask: bool `[B, Tk]` and `[B, Tq]`, True for a token, or None.
        kv, z, log_scale: the state before the call, in the dtype of the sums; None without one, z and log_scale also
            without a normalizer.
        tensors: all of these as they were given.
        parameters: of the queries' map, of the keys' map, of the decay.
    """

    def __init__(self, options: Options, tensors: tuple[Any, ...]) -> None:
        self.options, self.tensors = options, tensors
        self.q, self.k, self.v, self.log_weight, self.decay_tokens = tensors[:5]
        self.token_mask, self.query_mask = tensors[5:7]
        self.dtype = accumulation_dtype(self.v.dtype)
        state: Any = (None if x is None else x.to(self.dtype) for x in tensors[7:10])
        self.kv, self.z, self.log_scale = state
        self.parameters: _Tensors = tensors[10:]
        # Keys that come before the first query, or all of them, are only summed.
        self.offset = self.k.shape[2] - self.q.shape[2] if options.is_causal else self.k.shape[2]

    def key_blocks(self) -> list[slice]:
        """Blocks of the keys that are only summed."""
        return self._blocks(self.offset)

    def query_blocks(self) -> list[slice]:
        """Blocks of the queries."""
        return self._blocks(self.q.shape[2])

    def _blocks(self, length: int) -> list[slice]:
        size = block_size(self.v)
        return [slice(i, min(i + size, length)) for i in range(0, length, size)]

    def own_keys(self, rows: slice) -> slice:
        """Positions of these query rows among the keys."""
        return slice(self.offset + rows.start, self.offset + rows.stop)

    def real(self, now: slice) -> torch.Tensor | None:
        """bool `[B, 1, block]`, whether a key is a token; None if all are."""
        mask = self._mask(now)
        return None if mask is None else mask[:, None]

    def _mask(self, now: slice) -> torch.Tensor | None:
        return None if self.token_mask is None else self.token_mask[:, now]

    def queries(self, q: torch.Tensor, rows: slice, parameters: _Tensors) -> Features:
        """Features of a block of queries, and their log scale."""
        mask = None if self.query_mask is None else self.query_mask[:, rows]
        features, log_scale = self.options.q_map(safe_masked_fill(q, mask), *parameters[: self.options.counts[0]])
        return features.to(self.dtype), log_scale

    def key_inputs(self) -> list[torch.Tensor]:
        """What a block of keys is computed from: keys, and where there are any log weights and tokens of the decay."""
        return [x for x in (self.k, self.log_weight, self.decay_tokens) if x is not None]

    def keys(self, inputs: list[torch.Tensor], now: slice, parameters: _Tensors) -> Keys:
        """A block of keys from its part of `key_inputs`."""
        mask = self._mask(now)
        first, second = self.options.counts[0], sum(self.options.counts)
        features, weight = self.options.k_map(safe_masked_fill(inputs[0], mask), *parameters[first:second])
        weight = self.weigh(weight, None if self.log_weight is None else inputs[1])
        if weight is None and self.log_scale is not None:  # the state may hold weighted keys
            weight = torch.zeros_like(features[..., 0])
        decay = None
        if self.options.decay is not None:
            decay = self.options.decay(safe_masked_fill(inputs[-1], mask), *parameters[second:])
            decay = safe_masked_fill(decay.to(self.dtype), mask).clamp(min=_LEAST_DECAY)
        return Keys(features.to(self.dtype), None if weight is None else weight.to(self.dtype), decay)

    def weigh(self, weight: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
        """The sum of two log weights.

        Raises:
            ValueError: for weights without a normalizer.
        """
        if more is not None:
            weight = more if weight is None else weight + more
        if weight is not None and not self.options.normalized:
            raise ValueError("key_log_weight needs normalized=True: without a normalizer its scale does not cancel.")
        return weight

    def values(self, now: slice) -> torch.Tensor:
        """A block of values, contiguous, 0 at padded keys."""
        mask = self._mask(now)
        return safe_masked_fill(self.v[:, :, now].to(self.dtype), mask).contiguous()


def relative_to_peaks(
    log_weight: torch.Tensor, decay: torch.Tensor | None, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights exp(log_weight) that never overflow, made relative to a peak that decays along with the sums.

    Sums are kept relative to p_t = max(p_{t-1} + max_f g_tf, log w_t), which bounds every weight that row t sees.
    Relative to it key t has weight exp(log w_t - p_t) and the log-decay is g_t + p_{t-1} - p_t: neither exceeds 1, and
    the peak cancels in the quotient. The largest weight is at the peak when features decay alike; when they are reset
    one by one it may fall below it, so weights per key should then stay within e^80 of each other.

    Args:
        log_weight: `[B, H, T]`, `LOG_ZERO` at padded keys; -inf for weight 0.
        decay: log-decays `[B, H, T, F or 1]`; None for none.
        start: the peak before, `[B, H]`, `LOG_ZERO` before the first key; None for no key before.

    Returns:
        the weights, what is to be added to the log-decays, and the peaks, `[B, H, T]` each. Only the weights are
        differentiable.
    """
    fixed = log_weight.detach()
    elapsed = None if decay is None else decay.detach().amax(-1).cumsum(-1)
    peaks = (fixed if elapsed is None else fixed - elapsed).cummax(-1).values
    # Finite, also where all keys so far have weight 0.
    peaks = peaks.clamp(min=LOG_ZERO) if start is None else torch.maximum(peaks, start[..., None])
    if elapsed is not None:
        peaks = elapsed + peaks
    first = torch.full_like(peaks[..., :1], LOG_ZERO) if start is None else start[..., None]
    before = torch.cat([first, peaks[..., :-1]], -1)
    shift = torch.where(before > LOG_ZERO / 2, before - peaks, 0.0)  # nothing decays before the first key
    return (log_weight - peaks).exp(), shift, peaks
