"""Projection of keys and values along the sequence to k slots, E K and F V of Linformer (arXiv:2006.04768).

Column j of E belongs to the j-th *real* token of a row, wherever the padding is; a slot that no real token falls
into is not in use.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from hf_linear_attn.ops.compaction import take_tokens
from hf_linear_attn.ops.masking import pads_first_permutation, safe_masked_fill
from hf_linear_attn.ops.pooling import even_segment_starts, mix_tokens, segment_max, segment_mean

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
        k: slots; one int, or one per layer of the model. More than the model's `max_length` acts as that.
        sharing: `"none"` E and F per head and layer (2 h L matrices), `"headwise"` per layer (2 L),
            `"key_value"` E = F (L), `"layerwise"` one matrix for the whole model (1).
        projection: `"linear"` learned k x n_max; `"conv"` learned, kernel = stride = n_max / k (rounded up);
            `"mean_pool"`, `"max_pool"` no parameters, slots spread over the real tokens of each row.
        init: `"mean_pool"` starts learned projections as means of segments of n_max / k tokens; shorter
            inputs fill the first slots only. `"random"` is the paper's N(0, 1/k), far from the checkpoint.
        seed: of `init="random"`.
    """

    @property
    def k(self) -> int | tuple[int, ...]: ...
    @property
    def sharing(self) -> str: ...
    @property
    def projection(self) -> str: ...
    @property
    def init(self) -> str: ...
    @property
    def seed(self) -> int: ...


def check_projection_options(options: ProjectionOptions) -> None:
    """Raise `ValueError` for options that do not go together, each of `PROJECTION_CHOICES` and of integers k."""
    sizes = options.k if isinstance(options.k, tuple) else (options.k,)
    if options.sharing == "layerwise" and len(set(sizes)) > 1:
        raise ValueError(f"sharing='layerwise' needs one k for all layers, got k={list(sizes)}.")
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

    Raises:
        ValueError: for a list of k that has not one entry per layer of the model.
    """

    options: ProjectionOptions
    layer_idx: int
    num_layers: int
    num_heads: int
    head_dim: int
    max_length: int

    def __post_init__(self) -> None:
        sizes = self.options.k
        if isinstance(sizes, tuple) and len(sizes) != self.num_layers:
            raise ValueError(f"k={list(sizes)} has {len(sizes)} entries for {self.num_layers} layers.")

    @property
    def k(self) -> int:
        """Slots of this layer."""
        sizes = self.options.k
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
        """Tokens of a slot, rounded up."""
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
            keys and values `[B, H, slots, D]` of the slots that T tokens reach, and which of them are in use, bool
            `[B, slots]`; None if all are.

        Raises:
            ValueError: for more tokens than `max_length`.
        """
        length = key.shape[2]
        if length > self.max_length:
            limit = f"E has {self.max_length} columns: it was built for at most {self.max_length} tokens and got"
            raise ValueError(f"{limit} {length}. Convert with max_length={length} or more.")
        slots = self._slots(length)
        if padding is None:
            n_real = torch.full((1,), length, device=key.device)
        else:
            # Real tokens to the front: a token's place is then its rank, the column of E.
            order = pads_first_permutation(~padding)
            key, value = (take_tokens(safe_masked_fill(x, padding), order) for x in (key, value))
            n_real = padding.sum(-1)
        if key_weight is None:
            starts = even_segment_starts(n_real, slots)
            pool = segment_mean if self.options.projection == "mean_pool" else segment_max
            return pool(key, starts), pool(value, starts), None if padding is None else starts.diff() > 0
        key = self._project(key, key_weight, slots)
        value = self._project(value, key_weight if value_weight is None else value_weight, slots)
        if self.options.init == "random" and self.is_linear:  # slots have no segments: any token brings all into use
            return key, value, None if padding is None else (n_real > 0)[:, None].expand(-1, slots)
        if padding is None and self._first_rank(slots) == length:
            return key, value, None
        starts = self._first_rank(torch.arange(slots + 1, device=key.device)).expand(len(n_real), -1)
        counts = starts.minimum(n_real[:, None]).diff()  # real tokens per slot
        if self.options.init == "mean_pool":
            # The last slot in use may be half full: its mean is over the tokens that are there.
            fill = (starts.diff() / counts.clamp(min=1))[:, None, :, None].to(key.dtype)
            key, value = key * fill, value * fill
        return key, value, None if padding is None else counts > 0

    def _slots(self, length: int) -> int:
        """Slots that some of so many tokens fall into."""
        if self.is_convolution:
            return -(-length // self.kernel_size)
        if not self.is_linear:
            return min(self.k, length)
        return self.k if self.options.init == "random" else (length - 1) * self.k // self.max_length + 1

    def _first_rank(self, slot: Any) -> Any:
        """First rank of a slot's segment, for an int or a tensor of them."""
        return slot * self.kernel_size if self.is_convolution else -(-slot * self.max_length // self.k)

    def _project(self, x: torch.Tensor, weight: torch.Tensor, slots: int) -> torch.Tensor:
        weight = weight.to(x.dtype)
        if not self.is_linear:
            x = F.pad(x, (0, 0, 0, slots * self.kernel_size - x.shape[2]))
            return x.unflatten(2, (slots, self.kernel_size)).flatten(3) @ weight.flatten(1, 2)
        weight = weight[:, :slots, : x.shape[2]]
        return mix_tokens(weight, x) if len(weight) == 1 else weight @ x  # [h, k, n] @ [B, H, n, D]
