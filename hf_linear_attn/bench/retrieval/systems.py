"""Systems that turn token ids into vectors: the checkpoint, converted copies that share its weights, saved models.

Vectors are means of the last hidden states of real tokens, divided by their norm, as sentence-transformers makes them
of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hf_linear_attn.analysis.recordings import load_model
from hf_linear_attn.bench.retrieval.recipe import SystemRecipe
from hf_linear_attn.convert import convert_model, extend_positions
from hf_linear_attn.data import LongDocumentCollator, load_tokenizer
from hf_linear_attn.data.tokenization import special_frame
from hf_linear_attn.measure.methods import RefusedError, sharing_copy
from hf_linear_attn.measure.profile import longest_input
from hf_linear_attn.registry import get_patcher

__all__ = ["Checkpoint", "Embedder", "build_embedder", "embed", "load_encoder", "pieces_of"]

_BATCH_TOKENS = 4096  # of one forward, padding included; at least one sequence

Tokens = Sequence[int]


@dataclass(frozen=True)
class Checkpoint:
    """What all systems of a run start from.

    Attributes:
        model: without its head.
        tokenizer: its tokenizer.
        limit: tokens that it can read.
        before: special tokens in front of a text.
        after: those behind it.
    """

    model: Any
    tokenizer: Any
    limit: int
    before: list[int]
    after: list[int]

    @property
    def special(self) -> int:
        """Special tokens of a text."""
        return len(self.before) + len(self.after)


@dataclass(frozen=True)
class Embedder:
    """A system that is ready.

    Attributes:
        system: its recipe.
        checkpoint: what it starts from.
        model: what reads.
        limit: tokens that this model can read at a time.
    """

    system: SystemRecipe
    checkpoint: Checkpoint
    model: Any
    limit: int


def load_encoder(name: str) -> Checkpoint:
    """Load a checkpoint and its tokenizer.

    Raises:
        ValueError: for a checkpoint that is missing, converted already or of an unknown family, a tokenizer without a
            padding token, or a model without a limit that documents could be longer than.
    """
    model: Any = load_model(name)
    get_patcher(model.config.model_type)
    tokenizer = load_tokenizer(name)
    LongDocumentCollator(tokenizer)  # needs a padding token, and says so
    limit = longest_input(model)
    if limit is None:
        raise ValueError(f"The config of {name!r} states no longest input: nothing is truncated there.")
    return Checkpoint(model, tokenizer, limit, *special_frame(tokenizer))


def build_embedder(
    system: SystemRecipe,
    checkpoint: Checkpoint,
    room: int | None,
    calibration: Sequence[Mapping[str, Any]],
    seed: int,
) -> Embedder:
    """Convert a copy that shares the checkpoint's weights, or load a saved model.

    Args:
        system: what to build.
        checkpoint: what to build it from.
        room: tokens that the positions are extended to; None for what reads as many at a time as the checkpoint.
        calibration: batches that a calibrated start may be chosen on.
        seed: of variants that draw at random.

    Raises:
        RefusedError: where the conversion is refused, or the saved model's tokenizer is another.
    """
    model: Any
    if system.model is not None:
        model = load_model(system.model, max_length=room and max(room, checkpoint.limit))
        if load_tokenizer(system.model).get_vocab() != checkpoint.tokenizer.get_vocab():
            raise RefusedError(f"the tokenizer of {system.model!r} is another than the checkpoint's")
        limit = longest_input(model) or checkpoint.limit
        return Embedder(system, checkpoint, model, limit if room is not None else min(limit, checkpoint.limit))
    if room is None:
        return Embedder(system, checkpoint, checkpoint.model, checkpoint.limit)
    room = max(room, checkpoint.limit)
    model = sharing_copy(checkpoint.model)
    if system.method is None:
        extend_positions(model, room, system.extend)  # type: ignore[arg-type]
        return Embedder(system, checkpoint, model, room)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a start that is far from softmax, which is what is measured
        try:
            convert_model(
                model,
                system.method.key,
                max_length=room,
                extend=system.extend,  # type: ignore[arg-type]
                calibration=calibration if system.start_on_data else None,
                **system.method.seeded(seed),
            )
        except ValueError as error:
            raise RefusedError(str(error)) from error
    return Embedder(system, checkpoint, model, room)


def pieces_of(embedder: Embedder, document: Tokens, length: int) -> list[list[int]]:
    """What the model reads of a document of which `length` tokens may be read, each with its special tokens.

    Head and tail are the document's own, wherever it ends.

    Raises:
        RefusedError: for a length that the model cannot read at a time.
    """
    system, checkpoint = embedder.system, embedder.checkpoint
    at_once = min(length, embedder.limit) - checkpoint.special
    if system.reads == "whole" and length > embedder.limit:
        raise RefusedError(f"reads {embedder.limit:,} tokens at most")
    if system.reads == "head_tail" and len(document) > at_once:
        tail = at_once // 2
        texts = [[*document[: at_once - tail], *document[len(document) - tail :]]]
    elif system.reads == "chunks":
        text = document[: length - checkpoint.special]
        step = at_once - system.overlap
        if step < 1:
            raise RefusedError(f"windows of {at_once} tokens cannot overlap by {system.overlap}")
        last = max(0, len(text) - system.overlap - 1)  # a window that the one before it holds tells nothing
        texts = [list(text[start : start + at_once]) for start in range(0, last + 1, step)]
    else:
        texts = [list(document[:at_once])]
    return [[*checkpoint.before, *text, *checkpoint.after] for text in texts]


def embed(embedder: Embedder, documents: Sequence[Tokens], length: int) -> torch.Tensor:
    """Vectors of norm 1, one for each document `[N, W]`, in fp32 on the CPU.

    Several pieces of a document count as much as they have tokens.

    Args:
        embedder: what reads.
        documents: token ids without special tokens.
        length: tokens that may be read of each.

    Raises:
        RefusedError: as `pieces_of`.
    """
    pieces = [
        (index, piece) for index, document in enumerate(documents) for piece in pieces_of(embedder, document, length)
    ]
    totals: torch.Tensor | None = None
    collate = LongDocumentCollator(embedder.checkpoint.tokenizer)
    with torch.inference_mode():
        for batch in _batches(pieces):
            inputs = collate([{"input_ids": piece} for _, piece in batch])
            inputs = {name: value.to(embedder.model.device) for name, value in inputs.items()}
            states = embedder.model(**inputs).last_hidden_state.float()  # [B, T, W]
            mask = inputs["attention_mask"][..., None].to(states.dtype)
            counts = mask.sum(1)
            vectors = F.normalize((states * mask).sum(1) / counts, dim=-1)  # [B, W]
            if totals is None:
                totals = vectors.new_zeros(len(documents), vectors.shape[1])
            totals.index_add_(0, torch.tensor([index for index, _ in batch], device=totals.device), vectors * counts)
    assert totals is not None, "every document has a piece"
    return F.normalize(totals, dim=-1).cpu()


def _batches(pieces: Sequence[tuple[int, list[int]]]) -> Iterator[list[tuple[int, list[int]]]]:
    """Pieces of near lengths together, the longest first."""
    batch: list[tuple[int, list[int]]] = []
    for entry in sorted(pieces, key=lambda entry: -len(entry[1])):
        if batch and len(batch[0][1]) * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch
