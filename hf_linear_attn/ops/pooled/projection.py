"""Projection of keys and values along the sequence to k slots, E K and F V of Linformer (arXiv:2006.04768).

E has a column for each of `n_max` places. A row of n real tokens, wherever its padding is, spreads over all of them:
its tokens fall into min(k, n) even segments, one for each slot, and a token takes its share of the columns of its
segment. With n = n_max this is the paper's E. Without it a short text in a model for long ones would share a handful of
slots, or one. A slot that no real token falls into is not in use.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.base.compaction import take_tokens
from hf_linear_attn.ops.base.masking import pads_first_permutation, safe_masked_fill
from hf_linear_attn.ops.base.tracing import is_exported
from hf_linear_attn.ops.pooled.pooling import (
    even_segment_starts,
    mix_tokens,
    segment_max,
    segment_mean,
    segment_of_rank,
)

__all__ = ["PROJECTION_CHOICES", "SequenceProjection", "check_projection_options"]

# Option and the values that it may have.
PROJECTION_CHOICES = {
    "sharing": ("none", "headwise", "key_value", "layerwise"),
    "projection": ("linear", "mean_pool", "max_pool", "conv"),
    "init": ("mean_pool", "random"),
}


class ProjectionOptions(Protocol):
    """The options of a method that projects along the sequence.

    Attributes:
        k: slots; one int, or one per layer of the model. More than the model's `max_length` acts as that. Another
            value (`"auto"`) leaves them to the `size` of `SequenceProjection`.
        sharing: `"none"` E and F per head and layer (2 h L matrices), `"headwise"` per layer (2 L),
            `"key_value"` E = F (L), `"layerwise"` one matrix for the whole model (1).
        projection: `"linear"` learned k x n_max; `"conv"` learned, kernel = stride = n_max / k (rounded up);
            `"mean_pool"`, `"max_pool"` no parameters, slots spread over the real tokens of each row.
        init: `"mean_pool"` starts learned projections as `projection="mean_pool"`, at every length. `"random"` is the
            paper's N(0, 1/k), far from the checkpoint; a linear E that starts so has no segments, and shorter inputs
            use its first columns, as in the paper.
        seed: of `init="random"`.
    """

    @property
    def k(self) -> int | str | tuple[int, ...]: ...
    @property
    def sharing(self) -> str: ...
    @property
    def projection(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def seed(self) -> int: ...


def check_projection_options(options: ProjectionOptions) -> None:
    """Raise `ValueError` for options that do not go together, each allowed by itself."""
    sizes = options.k if isinstance(options.k, tuple) else (options.k,)
    if options.sharing == "layerwise" and (len(set(sizes)) > 1 or isinstance(options.k, str)):
        got = options.k if isinstance(options.k, str) else list(sizes)
        raise ValueError(f"sharing='layerwise' needs one k for all layers, got k={got!r}.")
    if options.init == "random" and options.projection.endswith("pool"):
        raise ValueError(f"init='random' needs projection='linear' or 'conv', got {options.projection!r}.")


@dataclass(frozen=True)
class SequenceProjection:
    """The projection of one layer; its weights are the caller's.

    Attributes:
        options: see `ProjectionOptions`.
        layer_idx: index of the layer.
        num_layers: layers in the model.
        num_heads: heads of the layer.
        head_dim: width of a head.
        max_length: columns of E.
        size: slots, in place of the options' k.
        value_pool: what `projection="max_pool"` makes of the values of a segment: `"max"` or `"mean"`.

    Raises:
        ValueError: for a list of k that has not one entry per layer of the model.
    """

    options: ProjectionOptions
    layer_idx: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_length: int
    size: int | None = None
    value_pool: str = "max"

    def __post_init__(self) -> None:
        sizes = self.options.k
        if isinstance(sizes, tuple) and len(sizes) != self.num_layers:
            raise ValueError(f"k={list(sizes)} has {len(sizes)} entries for {self.num_layers} layers.")

    @property
    def k(self) -> int:
        """Slots of this layer."""
        sizes = self.options.k if self.size is None else self.size
        if isinstance(sizes, str):
            raise ValueError(f"k={sizes!r} needs a size.")
        return min(sizes[self.layer_idx] if isinstance(sizes, tuple) else sizes, self.max_length)

    @functools.cached_property
    def is_linear(self) -> bool:
        """Whether E is a learned matrix."""
        return self.options.projection == "linear"

    @functools.cached_property
    def is_convolution(self) -> bool:
        """Whether E is a learned convolution."""
        return self.options.projection == "conv"

    @property
    def kernel_size(self) -> int:
        """Tokens of a slot in the longest input, rounded up."""
        return -(-self.max_length // self.k)

    @property
    def weight_shape(self) -> tuple[int, ...] | None:
        """Shape of E: `[H or 1, k, n_max]`, `[H or 1, kernel, D, D]` for a convolution; None for pooling."""
        heads = self.num_heads if self.options.sharing == "none" else 1
        if self.is_linear:
            return heads, self.k, self.max_length
        if self.is_convolution:
            return heads, self.kernel_size, self.head_dim, self.head_dim
        return None

    @property
    def one_matrix(self) -> bool:
        """Whether values are projected by the matrix of the keys."""
        return self.options.sharing in ("key_value", "layerwise")

    def generator(self) -> torch.Generator:
        """The source of a random start: of the seed and the layer, unless all layers share their matrix."""
        layer = 0 if self.options.sharing == "layerwise" else self.layer_idx
        return torch.Generator(device="cpu").manual_seed(self.options.seed * 100_003 + layer)

    def start(self, generator: torch.Generator) -> torch.Tensor:
        """What E starts as, on the CPU.

        Raises:
            ValueError: for pooling, which has no E.
        """
        shape = self.weight_shape
        if shape is None:
            raise ValueError(f"projection={self.options.projection!r} has no weights.")
        if self.options.init == "random":
            # Variance 1/k in the paper's E; for the convolution one over the terms of its sum.
            terms = self.k if self.is_linear else self.kernel_size * self.head_dim
            return torch.randn(shape, generator=generator, device="cpu") * terms**-0.5
        if self.is_convolution:
            return (torch.eye(shape[-1], device="cpu") / self.kernel_size).expand(shape)
        segment = torch.arange(shape[2], device="cpu") * self.k // shape[2]
        member = (segment == torch.arange(self.k, device="cpu")[:, None]).float()
        return (member / member.sum(-1, keepdim=True)).expand(shape)

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        padding: torch.Tensor | None,
        key_weight: torch.Tensor | None,
        value_weight: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Project.

        Args:
            key: `[B, H, T, D]`, and `value` likewise.
            padding: bool `[B, T]`, True for a real token, or None.
            key_weight: E, of `weight_shape`; None for pooling.
            value_weight: F; None for F = E.

        Returns:
            keys and values `[B, H, slots, D]`, and which slots are in use, bool `[B, slots]`; None if all are.

        Raises:
            ValueError: for more tokens than `max_length`.
        """
        length = key.shape[2]
        if length > self.max_length:
            limit = f"E has {self.max_length} columns: it was built for at most {self.max_length} tokens and got"
            raise ValueError(f"{limit} {length}. Convert with max_length={length} or more.")
        if padding is None:
            n_real = torch.full((1,), length, device=key.device)
        else:
            # Real tokens to the front: a token's place is then its rank.
            order = pads_first_permutation(~padding)
            key, value = (take_tokens(safe_masked_fill(x, padding), order) for x in (key, value))
            n_real = padding.sum(-1)
        each: Any = ((key, key_weight), (value, key_weight if value_weight is None else value_weight))
        if self.is_linear and self.options.init == "random":  # without segments any token brings all slots into use
            key, value = (self._mix(x, _columns(weight, length)[None]) for x, weight in each)
            return key, value, None if padding is None else (n_real > 0)[:, None].expand(-1, self.k)
        # An exported graph serves all lengths: the number of slots may not depend on them.
        exported = is_exported()
        slots = self.k if exported else min(self.k, length)
        starts = even_segment_starts(n_real, slots)
        in_use = None if padding is None and not exported else starts.diff() > 0
        if key_weight is None:
            pool = segment_mean if self.options.projection == "mean_pool" else segment_max
            return pool(key, starts), (segment_mean if self.value_pool == "mean" else pool)(value, starts), in_use
        if self.is_convolution:
            key, value = (self._convolve(x, weight, starts) for x, weight in each)
        elif not exported and padding is None and length == self.max_length:
            key, value = (self._mix(x, weight[None]) for x, weight in each)
        elif exported:  # a token has its segment for a place: how many places a segment has is not known
            slot = segment_of_rank(starts, length).clamp(max=slots - 1)
            place = torch.arange(length, device=key.device) - starts.gather(1, slot)
            place = torch.stack([place, place + 1], dim=-1)
            key, value = (self._mix(x, self._stretch(weight, starts, slot[..., None], place)) for x, weight in each)
        else:
            room = torch.arange(-(-length // slots) + 1, device=key.device)  # places for the tokens of a segment
            token = (starts[:, :-1, None] + room[:-1]).clamp(max=length - 1).flatten(1).expand(len(key), -1)
            slot = torch.arange(slots, device=key.device)[None, :, None]
            each = ((take_tokens(x, token), self._stretch(weight, starts, slot, room)) for x, weight in each)
            key, value = (self._mix(x, weight) for x, weight in each)
        return key, value, in_use

    def _stretch(
        self, weight: torch.Tensor, starts: torch.Tensor, slot: torch.Tensor, place: torch.Tensor
    ) -> torch.Tensor:
        """E for rows of fewer tokens than it has columns: a token's weight is the sum of the columns that it covers.

        Args:
            weight: `[H or 1, k, n_max]`.
            starts: `[B or 1, slots + 1]`, see `even_segment_starts`.
            slot: segments, `[B or 1, S, 1]`.
            place: where the tokens of a segment begin and the last one ends, broadcastable to `[B or 1, S, P + 1]`.

        Returns:
            `[B or 1, H or 1, slots, S * P]`, 0 at places without a token.
        """
        slots = starts.shape[1] - 1
        first = -(-torch.arange(slots + 1, device=weight.device) * self.max_length // self.k)  # column of each slot
        column, width = torch.arange(self.kernel_size, device=weight.device), first.diff()
        columns = weight[:, :slots, (first[:-1, None] + column).clamp(max=self.max_length - 1)]
        full = torch.promote_types(weight.dtype, torch.float32)
        columns = F.pad(columns.masked_fill(column >= width[:, None], 0).to(full), (0, 1))
        sums = F.pad(columns.cumsum(-1), (1, -1)).flatten(2)  # [h, slots, all columns], of those before in the segment
        # Place i of a segment of so many tokens begins i * width / tokens columns into its slot.
        count = starts.diff().gather(1, slot[..., 0].expand(starts.shape[0], -1))[..., None]
        ahead, count = place.minimum(count) * width[slot], count.clamp(min=1)
        whole = ahead // count + slot * (self.kernel_size + 1)
        before = sums[..., whole] + columns.flatten(2)[..., whole] * ((ahead % count).to(full) / count)
        return before.diff().flatten(-2).permute(2, 0, 1, 3)

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The convolution, with the kernel stretched over the tokens of each segment.

        Args:
            x: `[B, H, T, D]`, real tokens first and 0 in the others.
            weight: `[H or 1, kernel, D, D]`.
            starts: `[B or 1, slots + 1]`, see `even_segment_starts`.
        """
        column = torch.arange(self.kernel_size, device=x.device)
        count = starts.diff()[:, :, None]
        # Column c lies over token c * count // kernel of the segment, and may reach into the next one.
        token = column * count // self.kernel_size
        over = ((column + 1) * count - (token + 1) * self.kernel_size).clamp(min=0).to(x.dtype) / count.clamp(min=1)
        over, empty = (of_column[:, None, ..., None] for of_column in (over, count == 0))

        def taken(place: torch.Tensor) -> torch.Tensor:  # [B, H, slots, kernel, D]
            place = (starts[:, :-1, None] + place).clamp(max=x.shape[2] - 1).flatten(1)
            return take_tokens(x, place.expand(x.shape[0], -1)).unflatten(2, (-1, self.kernel_size))

        spread = (taken(token) * (1 - over) + taken(token + 1) * over).masked_fill(empty, 0)
        return spread.flatten(3) @ weight.to(x.dtype).flatten(1, 2)

    def _mix(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Sums over tokens `[B, H, T, D]` weighted by `[B or 1, H or 1, slots, T]`."""
        weight = weight.to(x.dtype)
        return mix_tokens(weight[:, 0], x) if weight.shape[1] == 1 else weight @ x


def _columns(weight: torch.Tensor, length: int) -> torch.Tensor:
    """The first columns of E; of a slice, an exported program would ask at which lengths it is the whole."""
    if is_exported():
        return weight.index_select(-1, torch.arange(length, device=weight.device))
    return weight[..., :length]
