"""Contrast: an embedder learns that a passage belongs to the rest of its document, and to no other of the batch."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_linear_attn.data.passages import cut_passages
from hf_linear_attn.data.tokenization import LongDocumentCollator, special_frame
from hf_linear_attn.training.batching import NeighborSampler
from hf_linear_attn.training.losses import contrast_loss, mean_states
from hf_linear_attn.training.parts import head_parameters
from hf_linear_attn.training.stage import LossStage

__all__ = ["ContrastTrainer", "check_batches", "check_pooling", "check_room", "shortest_document"]

POOLING = ("mean", "cls")

# PyTorch 2.11 counts buffers that DDP syncs before a call as changed: autograd then refuses what the first of a step's
# two calls kept of them.
_SYNC_CHANGES_BUFFERS = "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters


class ContrastTrainer(LossStage):
    """Trains an embedder without labels: a passage finds the rest of the document that it was taken out of.

    The inverse cloze task (Lee et al., Latent Retrieval for Weakly Supervised Open Domain Question Answering,
    arXiv:1906.00300): of every document of a batch a passage is drawn, and taken out together with a margin on both
    sides. Its vector is compared with those of what is left of all documents of the batch; the loss is the
    cross-entropy of the right one under a softmax over cosines (`contrast_loss`).

    A document that is longer than `max_length` is several pieces, which compete like different documents. Pieces
    shorter than two passages with their margins teach nothing and are left out. The documents of a batch are all the
    negatives there are: accumulated batches and other processes have their own. What a batch needs is held until its
    backward pass; `gradient_checkpointing` makes room for more documents.

    Args:
        model: converted or not; a head and a pooler take no part.
        args, train_dataset, ...: see `StageTrainer`; batches of two documents at least. A tokenizer is needed.
        passage_tokens: of a passage.
        margin: tokens on both sides of it that are in neither text.
        temperature: the cosines are divided by it.
        symmetric: whether documents find their passages as well, both directions counting alike.
        neighbors: whether a batch holds texts that follow one another in the data (addresses of a president, say),
            which are harder to tell apart than texts drawn from all of it; batches come in random order.
        pooling: what becomes of the last hidden states: `mean` over all tokens, or `cls`, the first one.

    Raises:
        ValueError: for an option out of range, batches of one document, a missing tokenizer, a `max_length` that no
            two passages fit, or fewer than two texts that are long enough; of a stream at the end of `train`.
    """

    _compared: bool | None = None
    """Whether any batch so far held two documents; None before the first."""

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        passage_tokens: int = 128,
        margin: int = 16,
        temperature: float = 0.05,
        symmetric: bool = False,
        neighbors: bool = False,
        pooling: str = "mean",
        **kwargs: Any,
    ) -> None:
        if passage_tokens < 1 or margin < 0:
            raise ValueError(f"passage_tokens={passage_tokens}, margin={margin}; allowed: at least 1, and at least 0")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature}; allowed: a finite number above 0")
        check_pooling(pooling)
        check_batches(args)
        tokenizer = kwargs.get("processing_class")
        if tokenizer is None:
            raise ValueError("Contrast needs processing_class, a tokenizer: it frames and pads passages")
        self.before, self.after = special_frame(tokenizer)
        self.pad = LongDocumentCollator(tokenizer)
        self.passage_tokens, self.margin = passage_tokens, margin
        self.temperature, self.symmetric, self.pooling = temperature, symmetric, pooling
        self.neighbors = neighbors
        self.shortest = shortest_document(passage_tokens, margin, len(self.before) + len(self.after))
        if args.ddp_broadcast_buffers is None and _SYNC_CHANGES_BUFFERS:
            args.ddp_broadcast_buffers = False
        super().__init__(model, args, **kwargs)
        if neighbors and not isinstance(self.train_dataset, Dataset):
            raise ValueError("neighbors=True is of data with a length; a stream comes in its own order")
        own = ("passage_tokens", "margin", "temperature", "symmetric", "neighbors", "pooling")
        self.settings |= {name: getattr(self, name) for name in own}
        for parameter in head_parameters(model).values():
            parameter.requires_grad_(False)

    def prepare(self, data: Any, tokenizer: Any) -> Any:
        check_room(self.shortest, self.max_length)
        pieces = super().prepare(data, tokenizer)
        if not hasattr(pieces, "filter"):
            return pieces
        least = self.shortest
        kept = pieces.filter(lambda row: len(row["input_ids"]) >= least)
        if isinstance(kept, Dataset) and len(kept) < 2:
            longest = max(map(len, pieces["input_ids"]), default=0)
            raise ValueError(
                f"{len(kept)} of {len(pieces)} pieces of text have {least} tokens, as two passages of "
                f"{self.passage_tokens} with their margins take, and contrast needs two; the longest has {longest}. "
                "Take longer texts or shorter passages"
            )
        return kept

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not self.neighbors:
            return super()._get_train_sampler(train_dataset)
        return NeighborSampler(len(self.train_dataset), self.args.train_batch_size, seed=self.args.seed)

    def loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        passages, documents = self.cut(inputs)
        if torch.is_grad_enabled():
            self._compared = bool(self._compared) or len(documents["input_ids"]) > 1
        queries, _ = self._vectors(model, passages)
        found, outputs = self._vectors(model, documents)
        return contrast_loss(queries, found, self.temperature, self.symmetric), outputs

    def cut(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Passages at places drawn anew, and what is left of their documents; each a padded batch.

        Drawn from the device's own generator, as masks are: a run that was cut off goes on with the same ones.

        Args:
            inputs: `input_ids` `[B, T]` and, where there is padding, `attention_mask`.
        """
        ids = inputs["input_ids"]
        real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        draws = torch.rand(len(ids), device=ids.device).tolist()
        span, special = self.passage_tokens + 2 * self.margin, len(self.before) + len(self.after)
        rows: tuple[list[list[int]], list[list[int]]] = ([], [])
        for row, mask, draw in zip(ids, real, draws, strict=True):
            document = row[mask].tolist()
            body = document[len(self.before) : len(document) - len(self.after)]
            assert len(document) >= special + span, "shorter ones are left out"
            left, [passage] = cut_passages(body, [int(draw * (len(body) - span + 1))], self.passage_tokens, self.margin)
            for texts, text in zip(rows, (passage, left), strict=True):
                texts.append([*self.before, *text, *self.after])
        passages, documents = (
            {name: value.to(ids.device) for name, value in self.pad([{"input_ids": text} for text in texts]).items()}
            for texts in rows
        )
        return passages, documents

    def _vectors(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Any]:
        outputs = model(**inputs, output_hidden_states=True)
        states, real = outputs.hidden_states[-1].float(), inputs["attention_mask"].bool()
        if self.pooling == "mean":
            return mean_states(states, real), outputs
        return states[torch.arange(len(states)), real.int().argmax(1)], outputs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `StageTrainer.train`; a stream is looked at as it comes."""
        output = super().train(*args, **kwargs)
        if self._compared is False:
            raise ValueError(
                f"No batch held two texts of {self.shortest} tokens: no passage had another document to be told from. "
                "Take longer texts or shorter passages"
            )
        return output


def shortest_document(passage_tokens: int, margin: int, special: int) -> int:
    """Tokens of a document that can be cut: a passage with its margins, as much again as the passage, special ones."""
    return 2 * passage_tokens + 2 * margin + special


def check_room(shortest: int, max_length: int) -> None:
    """Raise `ValueError` if no text of `max_length` tokens can be cut."""
    if shortest > max_length:
        raise ValueError(f"max_length={max_length}; two passages with their margins and special tokens take {shortest}")


def check_batches(args: Any) -> None:
    """Raise `ValueError` for batches of one document, which has no other to be told from."""
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if getattr(args, name) < 2:
            raise ValueError(f"{name}={getattr(args, name)}; contrast needs at least 2 documents in a batch")


def check_pooling(pooling: str) -> str:
    """The pooling, if it is one that contrast trains.

    Raises:
        ValueError: for another.
    """
    if pooling not in POOLING:
        raise ValueError(f"pooling={pooling!r}; allowed: {', '.join(POOLING)}")
    return pooling
