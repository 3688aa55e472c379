"""Attention layers of other people beside ours: what a user would otherwise run, with the same call.

Each peer is a whole layer, hidden states `[B, T, C]` to `[B, T, C]` with its projections; `ours` is the layer of our
variant with options, widths, biases and shared projections matched to it, so that a ratio of their times compares
the attention. What could not be matched is in `note`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_linear_attn.bench.peers import packages
from hf_linear_attn.bench.peers.flex import flex_layer
from hf_linear_attn.bench.peers.layers import LayerShape, Sharing, our_layer, softmax_layer

__all__ = ["SOFTMAX", "LayerShape", "Peer", "available_peers", "get_peer", "list_peers", "unavailable_peers"]

SOFTMAX = "softmax"
"""`Peer.method` of softmax attention, which is no variant."""


@dataclass(frozen=True)
class Peer:
    """An attention layer of somebody else.

    Attributes:
        name: unique.
        method: key of our variant, or `SOFTMAX`.
        options: of our variant, matched to the peer.
        causal: whether the layer is causal.
        package: what has to be installed; the name on the index.
        layer: builds the layer; see `build`.
        module: import name of the package.
        devices: kinds of device it runs on.
        trains_on: those where it has a backward pass.
        sharing: which projections it has in common; ours is built alike.
        bias: whether its query, key and value projections have biases; ours is built alike.
        length_options: further options of ours that depend on the shape.
        note: every known difference between the two.
    """

    name: str
    method: str
    options: dict[str, Any]
    causal: bool
    package: str
    layer: Callable[[LayerShape], nn.Module]
    module: str = "transformers"
    devices: tuple[str, ...] = ("cpu", "cuda")
    trains_on: tuple[str, ...] = ("cpu", "cuda")
    sharing: Sharing = "none"
    bias: bool = True
    length_options: Callable[[LayerShape], dict[str, Any]] | None = None
    note: str = ""
    needs_compiler: bool = field(default=False, repr=False)

    def _check(self, shape: LayerShape) -> None:
        if shape.is_causal != self.causal:
            raise ValueError(f"{self.name!r} is built for is_causal={self.causal}, got {shape}.")

    def build(self, shape: LayerShape) -> nn.Module:
        """Their layer in evaluation mode, on the CPU in fp32.

        Raises:
            ValueError: for the other causality, or a length that the peer does not take.
        """
        self._check(shape)
        return self.layer(shape)

    def ours(self, shape: LayerShape) -> nn.Module:
        """Our layer beside it, in evaluation mode, on the CPU in fp32; `ValueError` as `build`."""
        self._check(shape)
        if self.method == SOFTMAX:
            return softmax_layer(shape)
        return our_layer(shape, self.method, self.options_for(shape), sharing=self.sharing, bias=self.bias)

    def options_for(self, shape: LayerShape) -> dict[str, Any]:
        """All options of our variant for a layer of this shape."""
        return self.options | (self.length_options(shape) if self.length_options else {})

    def missing(self, device: str | torch.device) -> str | None:
        """Why it cannot run on this kind of device here; None if it can."""
        kind = torch.device(device).type
        if importlib.util.find_spec(self.module) is None:
            return f"{self.package} is not installed"
        if kind not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if self.needs_compiler and kind == "cpu" and _compiler() is None:
            return "torch.compile needs a C++ compiler, and none was found"
        return None


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "clang++") if name and (found := shutil.which(name))), None
    )


def available_peers(device: str | torch.device = "cpu") -> list[Peer]:
    """The peers that run here on this kind of device, in a fixed order."""
    return [peer for peer in _PEERS if peer.missing(device) is None]


def unavailable_peers(device: str | torch.device = "cpu") -> dict[str, str]:
    """Names of the others, each with the reason."""
    return {peer.name: reason for peer in _PEERS if (reason := peer.missing(device)) is not None}


def list_peers() -> list[str]:
    """Names of all peers, whether they run here or not."""
    return [peer.name for peer in _PEERS]


def get_peer(name: str) -> Peer:
    """The peer of this name; `ValueError` with the list of names otherwise."""
    for peer in _PEERS:
        if peer.name == name:
            return peer
    raise ValueError(f"Unknown peer {name!r}. Available: {', '.join(list_peers())}.")


_OUTPUT = "Its output projection, another module upstream, is put back."


def _softmax(causal: bool) -> list[Peer]:
    side = " causal" if causal else ""
    eager = packages.with_core(packages.EagerCore, takes_shape=True)
    note = "Ours is what converted models run in layers that keep softmax: SDPA."
    return [
        Peer("eager" + side, SOFTMAX, {}, causal, "transformers", eager, note=note),
        Peer("sdpa" + side, SOFTMAX, {}, causal, "torch", softmax_layer, module="torch", note=note + " So is this."),
    ]


def _encoders() -> list[Peer]:
    return [
        Peer(
            "transformers longformer",
            "longformer",
            {"window_size": packages.WINDOW, "num_global_tokens": 1},
            False,
            "transformers",
            packages.transformers_longformer,
            note=f"Window 512, the first token global, as both have by default. {_OUTPUT}",
        ),
        Peer(
            "transformers bigbird",
            "bigbird",
            dict(packages.BIGBIRD),
            False,
            "transformers",
            packages.transformers_bigbird,
            note="Blocks of 64, 3 random ones. Its model falls back to full attention up to 704 tokens, and so does "
            "this layer; ours up to 448. In evaluation mode it draws no random blocks (block 0 three times, as "
            f"costly); in training mode it draws them with NumPy in every call, ours once. {_OUTPUT}",
        ),
        Peer(
            "transformers nystromformer",
            "nystromformer",
            {"num_landmarks": packages.LANDMARKS, "conv_kernel_size": packages.CONV},
            False,
            "transformers",
            packages.transformers_nystromformer,
            note=f"64 landmarks, a convolution of 33 tokens, 6 iterations. {_OUTPUT}",
        ),
        Peer(
            "nystrom-attention",
            "nystromformer",
            {"num_landmarks": packages.LANDMARKS, "conv_kernel_size": packages.CONV},
            False,
            "nystrom-attention",
            packages.nystrom_package,
            module="nystrom_attention",
            bias=False,
            note="64 landmarks, a convolution of 33 tokens, 6 iterations. One matrix makes its q, k and v.",
        ),
        Peer(
            "linformer",
            "linformer",
            {"k": packages.SLOTS, "sharing": "headwise"},
            False,
            "linformer",
            packages.linformer_package,
            module="linformer",
            bias=False,
            note="128 slots, projections for this length, shared by the heads.",
        ),
    ]


def _either(causal: bool) -> list[Peer]:
    side = " causal" if causal else ""
    r = 1 if causal else packages.LONG_SHORT_LANDMARKS
    long_short = {"window_size": 2 * packages.LONG_SHORT_WINDOW, "num_landmarks": r, "norm_gate": 1.0}
    if causal:
        long_short["segment_size"] = packages.LONG_SHORT_SEGMENT
    lsh = {"num_hashes": packages.HASHES, "chunk_size": packages.CHUNK, "share_qk": True}
    sees = " Causal: it sorts the whole sequence, and its chunks show the future to the hashing; ours does not."
    duplicates = (
        "4 hashes, chunks of 64, keys are queries. It counts a key once for each hash that finds it; ours once."
    )
    efficient_note = "Coordinates as features: it has no others. Theirs multiplies the output by a constant."
    if causal:
        efficient_note = (
            "Coordinates as features: it has no others. "
            "Its causal form is another function: one normalizer for all features, which overflows."
        )
    return [
        Peer(
            "performer-pytorch" + side,
            "performer",
            {"num_features": packages.FEATURES, "variance_reducer": False},
            causal,
            "performer-pytorch",
            packages.performer_package,
            module="performer_pytorch",
            bias=False,
            note="128 features. Ours without the variance reducer, which it has not."
            + (" Its causal form without its CUDA extension." if causal else ""),
        ),
        Peer(
            "linear-attention-transformer" + side,
            "efficient",
            {"feature_map": "identity"},
            causal,
            "linear-attention-transformer",
            packages.efficient_package,
            module="linear_attention_transformer",
            bias=False,
            note=efficient_note,
        ),
        Peer(
            "long-short-transformer" + side,
            "long_short",
            long_short,
            causal,
            "long-short-transformer",
            packages.long_short_package,
            module="long_short_transformer",
            sharing="key_value",
            bias=False,
            note="Keys are values; its rotary embeddings are off. Its windows are blocks of 128 that look one block "
            f"around ({'128 to 256' if causal else '384'} keys a token); ours slides over 256. "
            + ("Landmarks of segments of 16." if causal else "32 landmarks."),
        ),
        Peer(
            "transformers reformer" + side,
            "reformer",
            {**lsh, "num_buckets": packages.BUCKETS},
            causal,
            "transformers",
            packages.transformers_reformer,
            sharing="query_key",
            bias=False,
            note=f"{duplicates} 16 buckets. {_OUTPUT}" + (sees if causal else ""),
        ),
        Peer(
            "reformer-pytorch" + side,
            "reformer",
            lsh,
            causal,
            "reformer-pytorch",
            packages.reformer_package,
            module="reformer_pytorch",
            sharing="query_key",
            bias=False,
            length_options=lambda shape: {"num_buckets": max(2, shape.length // packages.CHUNK)},
            note=f"{duplicates} A bucket for every 64 tokens." + (sees if causal else ""),
        ),
    ]


def _flash_linear_attention() -> list[Peer]:
    package: dict[str, Any] = {"package": "flash-linear-attention", "module": "fla", "causal": True}
    kernels: dict[str, Any] = {**package, "devices": ("cuda",), "trains_on": ("cuda",)}
    naive: dict[str, Any] = {**package, "devices": ("cpu",), "trains_on": ("cpu",)}
    reference = "Its chunked reference in PyTorch, written to be read; lengths are multiples of its chunk."
    linear = {"feature_map": "elu", "variance_reducer": False}
    retention = {"feature_map": "identity", "init": "published", "learnable": False}
    gated = {"feature_map": "identity", "init": "published", "gate_rank": 16}
    core = packages.with_core
    return [
        Peer("fla linear", "linear", linear, layer=core(packages.FlaLinear), note="With its normalizer.", **kernels),
        Peer("fla retention", "retention", retention, layer=core(packages.FlaRetention), **kernels),
        Peer("fla gla", "gated", gated, layer=core(packages.FlaGated, takes_shape=True), **kernels),
        Peer("fla naive linear", "linear", linear, layer=core(packages.FlaNaiveLinear), note=reference, **naive),
        Peer(
            "fla naive retention",
            "retention",
            retention,
            layer=core(packages.FlaNaiveRetention),
            note=reference,
            **naive,
        ),
        Peer(
            "fla naive based",
            "taylor",
            {"num_features": None, "variance_reducer": False},
            layer=core(packages.FlaNaiveTaylor),
            note=f"{reference} All coordinates of a head, not 16.",
            **naive,
        ),
    ]


def _flex(causal: bool) -> list[Peer]:
    side = " causal" if causal else ""
    masks: list[tuple[str, str, dict[str, Any], str]] = [
        ("window", "longformer", {"window_size": packages.WINDOW, "num_global_tokens": 0}, "Window 512."),
        ("bigbird", "bigbird", dict(packages.BIGBIRD), "Blocks of 64, the random ones that ours drew."),
        ("strided", "sparse", {"pattern": "strided"}, "Our stride, sqrt(n): every block of 128 is visited."),
    ]
    return [
        Peer(
            f"flex_attention {name}{side}",
            method,
            options,
            causal,
            "torch",
            partial(flex_layer, key=method, options=options),
            module="torch",
            trains_on=("cuda",),
            note=f"{note} Compiled in its first call; no backward on a CPU, no dropout.",
            needs_compiler=True,
        )
        for name, method, options, note in masks
    ]


_PEERS: tuple[Peer, ...] = (
    *_softmax(False),
    *_encoders(),
    *_either(False),
    *_flex(False),
    *_softmax(True),
    *_either(True),
    *_flash_linear_attention(),
    *_flex(True),
)
