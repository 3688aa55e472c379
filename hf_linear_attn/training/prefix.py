"""Run frozen lower layers once per document and keep what comes out of them.

When only the last layers train, the layers below compute the same thing in every epoch. `FrozenPrefix` stops the
forward pass at the first trained layer, keeps that layer's input for each document, and later feeds it back while
the frozen layers are skipped. The model's own forward is used for both, so nothing about a family is repeated here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hf_linear_attn.seam.extra_tokens import extra_tokens_of
from hf_linear_attn.training.parts import transformer_layers

__all__ = ["FrozenPrefix"]


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass at the first trained layer, carrying that layer's input."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        super().__init__("the first trained layer was reached")
        self.hidden_states = hidden_states


def _skip(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


class FrozenPrefix:
    """Outputs of the first `len(layers) - last_layers` layers, per document.

    With `last_layers=0` (only the head trains) the input of the last layer is what is kept: the head alone is not
    a layer that the forward could be entered at.

    Args:
        dtype: what is stored. The forward pass's own dtype keeps training identical to running the layers each time.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._store: dict[int, torch.Tensor] = {}  # document id -> [tokens, hidden_size], on the CPU
        self._fingerprint = ""

    def __len__(self) -> int:
        return len(self._store)

    def check(self, model: nn.Module, last_layers: int) -> None:
        """Make sure that what is stored came from these weights.

        Raises:
            ValueError: if tokens travel through the layers (`seam.extra_tokens`), a frozen layer trains, or the store
                was filled by other weights.
        """
        if extra_tokens_of(model) is not None:
            raise ValueError("Tokens that travel beside a document are not kept; allowed: cache_frozen_layers=False")
        layers = transformer_layers(model)
        boundary = self._boundary(model, last_layers)
        digest = hashlib.sha256()
        frozen = [module for name, module in model.base_model.named_children() if "embed" in name]  # type: ignore[union-attr, operator]
        for module in (*frozen, *layers[:boundary]):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    raise ValueError("The frozen part holds a parameter that trains; its output cannot be kept")
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        if self._store and digest.hexdigest() != self._fingerprint:
            raise ValueError("This cache of frozen layers was filled by a model with other weights")
        self._fingerprint = digest.hexdigest()

    @staticmethod
    def _boundary(model: nn.Module, last_layers: int) -> int:
        return len(transformer_layers(model)) - max(last_layers, 1)

    def fill(self, model: nn.Module, batch: dict[str, torch.Tensor], ids: list[int], last_layers: int) -> int:
        """Compute and keep what is missing for the documents of `batch`; returns the tokens that were computed.

        Args:
            batch: model inputs `[B, T]`, padded on either side.
            ids: B document ids.
        """
        missing = [row for row, document in enumerate(ids) if document not in self._store]
        if not missing:
            return 0
        inputs = {name: tensor[missing] for name, tensor in batch.items() if name != "labels"}
        real = inputs["attention_mask"].bool()
        first = transformer_layers(model)[self._boundary(model, last_layers)]

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Reached(args[0] if args else kwargs["hidden_states"])

        handle = first.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad():
                model(**inputs)
            raise ValueError(f"The forward pass of {type(model).__name__} never reached its trained layers")
        except _Reached as reached:
            hidden_states = reached.hidden_states
        finally:
            handle.remove()
        for row, index in enumerate(missing):
            self._store[ids[index]] = hidden_states[row][real[row]].to("cpu", self.dtype)
        return int(real.sum())

    @contextmanager
    def feed(
        self, model: nn.Module, batch: dict[str, torch.Tensor], ids: list[int], last_layers: int
    ) -> Iterator[None]:
        """Within the block, a forward of `model` on `batch` starts from the stored hidden states."""
        layers = transformer_layers(model)
        boundary = self._boundary(model, last_layers)
        rows = [self._store[document] for document in ids]
        real = batch["attention_mask"].bool()
        hidden = torch.zeros(*real.shape, rows[0].shape[-1], dtype=torch.float32, device=real.device)
        hidden[real] = torch.cat(rows).to(hidden)

        def substitute(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        handle = layers[boundary].register_forward_pre_hook(substitute, with_kwargs=True)
        for layer in layers[:boundary]:
            layer.forward = _skip
        try:
            yield
        finally:
            handle.remove()
            for layer in layers[:boundary]:
                del layer.forward
