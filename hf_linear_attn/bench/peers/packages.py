"""Attention layers of other people's packages, each with the projections it comes with and one of ours beside it.

A builder takes a `LayerShape` and returns a layer in evaluation mode, hidden states `[B, T, C]` to `[B, T, C]`; the
packages are imported in the builders.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_linear_attn.bench.peers.layers import LayerShape, ProjectedAttention

__all__ = [
    "BIGBIRD",
    "EagerCore",
    "FlaGated",
    "FlaLinear",
    "FlaNaiveLinear",
    "FlaNaiveRetention",
    "FlaNaiveTaylor",
    "FlaRetention",
    "efficient_package",
    "linformer_package",
    "long_short_package",
    "nystrom_package",
    "performer_package",
    "reformer_package",
    "transformers_bigbird",
    "transformers_longformer",
    "transformers_nystromformer",
    "transformers_reformer",
    "with_core",
]

WINDOW, LANDMARKS, CONV, FEATURES, SLOTS, HASHES, CHUNK, BUCKETS = 512, 64, 33, 128, 128, 4, 64, 16
LONG_SHORT_WINDOW, LONG_SHORT_SEGMENT, LONG_SHORT_LANDMARKS = 128, 16, 32
BIGBIRD = {"block_size": 64, "num_random_blocks": 3}


def _require_multiple(shape: LayerShape, of: int, package: str) -> None:
    if shape.length % of:
        raise ValueError(f"length={shape.length}; allowed with {package}: a multiple of {of}.")


class _WithOutput(nn.Module):
    """Transformers keeps the output projection in another module: put back here."""

    def __init__(self, shape: LayerShape, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.output = nn.Linear(shape.hidden_size, shape.hidden_size)


class _Longformer(_WithOutput):
    codes: torch.Tensor

    def __init__(self, shape: LayerShape, attention: nn.Module) -> None:
        super().__init__(shape, attention)
        codes = torch.zeros(shape.batch, shape.length)
        codes[:, 0] = 10000.0  # the first token is global
        self.register_buffer("codes", codes)
        self.register_buffer("is_masked", codes < 0)
        self.register_buffer("is_global", codes > 0)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        masks = {"attention_mask": self.codes, "is_index_masked": self.is_masked}
        masks["is_index_global_attn"] = self.is_global
        return self.output(self.attention(hidden, **masks, is_global_attn=True)[0])


def transformers_longformer(shape: LayerShape) -> nn.Module:
    """Transformers' `LongformerSelfAttention`."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    _require_multiple(shape, WINDOW, "Transformers' Longformer")
    config = LongformerConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_hidden_layers=1,
        attention_window=[WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    return _Longformer(shape, LongformerSelfAttention(config, 0)).eval()


class _BigBird(_WithOutput):
    def __init__(self, shape: LayerShape, attention: nn.Module, masks: Any) -> None:
        super().__init__(shape, attention)
        self.names = ("from_blocked_mask", "band_mask", "from_mask", "to_mask")
        for name, mask in zip(self.names, masks, strict=True):
            self.register_buffer(name, mask)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        masks = {name: getattr(self, name) for name in self.names}
        return self.output(self.attention(hidden, to_blocked_mask=self.from_blocked_mask, **masks)[0])


class _First(_WithOutput):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(hidden)[0])


def transformers_bigbird(shape: LayerShape) -> nn.Module:
    """Transformers' `BigBirdBlockSparseAttention`; up to 704 tokens its full attention, as its model does."""
    from transformers import BigBirdConfig, BigBirdModel
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdSelfAttention

    size, random = BIGBIRD["block_size"], BIGBIRD["num_random_blocks"]
    _require_multiple(shape, size, "Transformers' BigBird")
    config = BigBirdConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_hidden_layers=1,
        block_size=size,
        num_random_blocks=random,
        max_position_embeddings=max(4096, shape.length),
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = "eager"  # of the full attention
    if shape.length <= (5 + 2 * random) * size:
        return _First(shape, BigBirdSelfAttention(config)).eval()
    ones = torch.ones(shape.batch, shape.length)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(ones, size)
    return _BigBird(shape, BigBirdBlockSparseAttention(config, seed=0), masks).eval()


def transformers_nystromformer(shape: LayerShape) -> nn.Module:
    """Transformers' `NystromformerSelfAttention`."""
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    _require_multiple(shape, LANDMARKS, "Transformers' Nystromformer")
    config = NystromformerConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        num_landmarks=LANDMARKS,
        segment_means_seq_len=shape.length,
        conv_kernel_size=CONV,
        attention_probs_dropout_prob=0.0,
    )
    return _First(shape, NystromformerSelfAttention(config)).eval()


class _Reformer(_WithOutput):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(self.attention(hidden).hidden_states)


def transformers_reformer(shape: LayerShape) -> nn.Module:
    """Transformers' `LSHSelfAttention`."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    _require_multiple(shape, CHUNK, "Transformers' Reformer")
    config = ReformerConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        attention_head_size=shape.head_dim,
        attn_layers=["lsh"],
        num_hashes=HASHES,
        num_buckets=BUCKETS,
        lsh_attn_chunk_length=CHUNK,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=shape.is_causal,
        max_position_embeddings=shape.length,
    )
    return _Reformer(shape, LSHSelfAttention(config, layer_idx=0)).eval()


def reformer_package(shape: LayerShape) -> nn.Module:
    """reformer-pytorch's `LSHSelfAttention`."""
    from reformer_pytorch import LSHSelfAttention

    _require_multiple(shape, 2 * CHUNK, "reformer-pytorch")
    return LSHSelfAttention(
        shape.hidden_size, heads=shape.num_heads, bucket_size=CHUNK, n_hashes=HASHES, causal=shape.is_causal
    ).eval()


def performer_package(shape: LayerShape) -> nn.Module:
    """performer-pytorch's `SelfAttention`."""
    from performer_pytorch import SelfAttention

    options = {"heads": shape.num_heads, "dim_head": shape.head_dim, "nb_features": FEATURES}
    with contextlib.redirect_stdout(io.StringIO()):  # the causal form prints that its CUDA extension is missing
        return SelfAttention(shape.hidden_size, causal=shape.is_causal, **options).eval()


def linformer_package(shape: LayerShape) -> nn.Module:
    """linformer's `LinformerSelfAttention`."""
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(shape.hidden_size, shape.length, k=SLOTS, heads=shape.num_heads).eval()


def nystrom_package(shape: LayerShape) -> nn.Module:
    """nystrom-attention's `NystromAttention`."""
    from nystrom_attention import NystromAttention

    return NystromAttention(
        shape.hidden_size,
        dim_head=shape.head_dim,
        heads=shape.num_heads,
        num_landmarks=LANDMARKS,
        residual_conv_kernel=CONV,
    ).eval()


def efficient_package(shape: LayerShape) -> nn.Module:
    """linear-attention-transformer's `SelfAttention`."""
    from linear_attention_transformer.linear_attention_transformer import SelfAttention

    return SelfAttention(shape.hidden_size, shape.num_heads, causal=shape.is_causal).eval()


def long_short_package(shape: LayerShape) -> nn.Module:
    """long-short-transformer's `LongShortAttention`, without its rotary embeddings."""
    from long_short_transformer.long_short_transformer import LongShortAttention

    _require_multiple(shape, LONG_SHORT_WINDOW, "long-short-transformer")
    layer = LongShortAttention(
        dim=shape.hidden_size,
        heads=shape.num_heads,
        dim_head=shape.head_dim,
        causal=shape.is_causal,
        window_size=LONG_SHORT_WINDOW,
        segment_size=LONG_SHORT_SEGMENT,
        r=1 if shape.is_causal else LONG_SHORT_LANDMARKS,
    )
    layer.pos_emb = None
    return layer.eval()


class EagerCore(nn.Module):
    """Transformers' eager attention: the T x T weights are formed."""

    mask: torch.Tensor | None

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        mask = None
        if shape.is_causal:
            mask = torch.full((shape.length, shape.length), torch.finfo(torch.float32).min).triu(1)[None, None]
        self.register_buffer("mask", mask)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from transformers.models.bert.modeling_bert import eager_attention_forward

        return eager_attention_forward(self, q, k, v, self.mask, scaling=q.shape[-1] ** -0.5)[0].transpose(1, 2)


def _elu(x: torch.Tensor) -> torch.Tensor:
    return F.elu(x * x.shape[-1] ** -0.25) + 1


class FlaNaiveLinear(nn.Module):
    """flash-linear-attention's chunked reference of linear attention, with its normalizer."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn

        q, k, v = (x.transpose(1, 2) for x in (_elu(q), _elu(k), v))
        return naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True).transpose(1, 2)


class FlaNaiveTaylor(nn.Module):
    """flash-linear-attention's chunked reference of Based."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.based.naive import naive_chunk_based

        return naive_chunk_based(q, k, v)


def _decay(heads: int) -> torch.Tensor:
    """RetNet's decays as logarithms, `[H]`."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads)))


class FlaNaiveRetention(nn.Module):
    """flash-linear-attention's chunked reference of scalar decays, at RetNet's."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.simple_gla.naive import naive_chunk_simple_gla

        decay = _decay(q.shape[1]).to(q).expand(q.shape[0], q.shape[2], -1)
        return naive_chunk_simple_gla(*(x.transpose(1, 2) for x in (q, k, v)), decay)[0].transpose(1, 2)


class FlaLinear(nn.Module):
    """flash-linear-attention's `chunk_linear_attn` with its normalizer."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        q, k, v = (x.transpose(1, 2) for x in (_elu(q), _elu(k), v))
        return chunk_linear_attn(q, k, v, scale=1.0, normalize=True)[0].transpose(1, 2)


class FlaRetention(nn.Module):
    """flash-linear-attention's `chunk_retention`."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.retention import chunk_retention

        return chunk_retention(*(x.transpose(1, 2) for x in (q, k, v)))[0].transpose(1, 2)


class FlaGated(nn.Module):
    """flash-linear-attention's `chunk_gla` with the gate of its layer: low rank, log-sigmoid over 16."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.Linear(shape.hidden_size, 16, bias=False), nn.Linear(16, shape.num_heads * shape.head_dim)
        )

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        from fla.ops.gla import chunk_gla

        gate = F.logsigmoid(self.gate(hidden)).unflatten(-1, (q.shape[1], -1)) / 16
        return chunk_gla(*(x.transpose(1, 2) for x in (q, k, v)), gate)[0].transpose(1, 2)


def with_core(core: type[nn.Module], *, takes_shape: bool = False) -> Any:
    """A builder of layers around `core`."""

    def build(shape: LayerShape) -> nn.Module:
        return ProjectedAttention(shape, core(shape) if takes_shape else core()).eval()

    return build
