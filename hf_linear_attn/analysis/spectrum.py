"""What the papers argue from, measured on a real model: spectra, error against size, attention patterns.

Everything takes recordings (`hf_linear_attn.analysis.recordings.record_layers`) and returns tensors or plain
lists; `hf_linear_attn.analysis.pictures` draws them.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_linear_attn.analysis.recordings import build_layers, choose_start, record_layers
from hf_linear_attn.calibration import Recording, output_errors
from hf_linear_attn.ops.base.masking import causal_mask
from hf_linear_attn.ops.starts.spectrum import cumulative_spectrum, linformer_bound
from hf_linear_attn.registry import get_variant
from hf_linear_attn.variants.base import AttentionInputs, State

__all__ = [
    "LOW_RANK_OPTIONS",
    "SIZE_OPTIONS",
    "SizeError",
    "attention_spectrum",
    "effective_attention",
    "error_against_size",
    "linformer_bound",
    "passage_spectrum",
    "size_for_error",
    "size_option",
    "small_size",
    "softmax_weights",
]

logger = logging.getLogger(__name__)

Attend = Callable[[AttentionInputs, State | None], tuple[torch.Tensor, State | None]]

# Options that set how much of the attention a method keeps, with sizes worth trying. One name means one thing in
# every method, so that nothing here needs to know the methods; of several, the first one decides.
SIZE_OPTIONS: dict[str, tuple[int, ...]] = {
    "k": (8, 16, 32, 64, 128, 256),
    "num_landmarks": (8, 16, 32, 64, 128, 256),
    "num_hashes": (1, 2, 4, 8),
    "window_size": (8, 16, 32, 64, 128, 256),
    "block_size": (8, 16, 32, 64),
    "stride": (8, 16, 32, 64, 128),
    "num_features": (16, 32, 64, 128, 256, 512),
}
LOW_RANK_OPTIONS = ("k", "num_landmarks")  # those that Linformer's theorem speaks of
_BLOCKS_SEEN = 4  # a query of a block method sees several blocks


def softmax_weights(inputs: AttentionInputs) -> torch.Tensor:
    """Softmax attention's matrix `[B, H, Tq, Tk]` in float32; columns of padding are 0, as are rows without a key."""
    logits = inputs.query.float() @ inputs.key.float().mT * inputs.scaling
    allowed = torch.ones(1, 1, 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
    if inputs.token_mask is not None:
        allowed = inputs.token_mask[:, None, None, :]
    if inputs.is_causal:
        allowed = allowed & causal_mask(logits.shape[-2], logits.shape[-1], logits.device)
    weights = logits.masked_fill(~allowed, -math.inf).softmax(-1)
    return weights.masked_fill(~allowed, 0.0)


@torch.no_grad()
def effective_attention(variant: Attend, inputs: AttentionInputs) -> torch.Tensor:
    """The matrix A with which a variant mixes values, output = A value + constant: `[B, H, Tq, Tk]` in float32.

    Found by feeding one-hot values, D columns at a time, so it holds for any variant that is linear in its values,
    whatever it is. What does not come from `value` (a global row with a value projection of its own) is the constant,
    and its row of A is 0.
    """
    value = torch.zeros_like(inputs.value, dtype=torch.float32)
    constant = variant(replace(inputs, value=value), None)[0].float()
    keys, width = value.shape[2:]
    columns = []
    for start in range(0, keys, width):
        value.zero_()
        block = min(width, keys - start)
        value[:, :, start : start + block, :block] = torch.eye(block, device=value.device)
        columns.append((variant(replace(inputs, value=value), None)[0].float() - constant)[..., :block])
    return torch.cat(columns, -1)


@torch.no_grad()
def attention_spectrum(recording: Recording) -> torch.Tensor:
    """Cumulative singular values of the softmax matrices, as shares of their sum: `[H, T]`, ascending to 1.

    Linformer's figure (arXiv:2006.04768): where the curve rises early, a few singular directions carry the matrix.
    The mean over the recorded documents, which must have one length and no padding.

    Raises:
        ValueError: for documents of several lengths.
    """
    lengths = sorted({inputs.key.shape[2] for inputs in recording.inputs})
    if len(lengths) != 1:
        raise ValueError(f"The spectrum is a mean over documents of one length; got lengths {lengths}.")
    curves = []
    for inputs in recording.inputs:
        curves.append(cumulative_spectrum(softmax_weights(inputs)).mean(0))  # of [B, H, T]
    return torch.stack(curves).mean(0)


def passage_spectrum(
    model: PreTrainedModel, batches: Iterable[dict[str, Any]], on_passages: Callable[[int], None] | None = None
) -> dict[int, torch.Tensor]:
    """`attention_spectrum` of every layer over more passages than fit into memory: one batch is recorded at a time.

    Args:
        model: a checkpoint; it is as it was afterwards.
        batches: passages of one length, without padding.
        on_passages: told how many are done after each batch.
    """
    total: dict[int, torch.Tensor] = {}
    done = 0
    for batch in batches:
        passages = len(batch["input_ids"])
        for layer, recording in record_layers(model, [batch]).items():
            curve = passages * attention_spectrum(recording).double()
            total[layer] = total[layer] + curve if layer in total else curve
        done += passages
        if on_passages is not None:
            on_passages(done)
    return {layer: curve / done for layer, curve in total.items()}


def size_option(key: str) -> str | None:
    """The option that sets the size of a registered variant, None for a method without one."""
    options = get_variant(key).config_class().to_dict()  # type: ignore[attr-defined]
    return next((name for name in SIZE_OPTIONS if isinstance(options.get(name, ()), (int, type(None)))), None)


def small_size(key: str, limit: int) -> dict[str, int]:
    """The size option of a variant brought down to `limit`, so that a short input exercises the method; or nothing."""
    option = size_option(key)
    if option is None:
        return {}
    limit = limit // _BLOCKS_SEEN if option == "block_size" else limit
    sizes = SIZE_OPTIONS[option]
    small = max((size for size in sizes if size <= limit), default=sizes[0])
    default = get_variant(key).config_class().to_dict()[option]  # type: ignore[attr-defined]
    return {option: small if default is None else min(default, small)}


@dataclass(frozen=True)
class SizeError:
    """Error of one method at one size and length, the mean over layers.

    Attributes:
        length: tokens of a document.
        size: value of the method's size option.
        error: relative output error against softmax.
        cosine: mean cosine of outputs.
    """

    length: int
    size: int
    error: float
    cosine: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def error_against_size(
    model: PreTrainedModel,
    key: str,
    option: str,
    sizes: Sequence[int],
    test: Mapping[int, Mapping[int, Recording]],
    calibration: Mapping[int, Mapping[int, Recording]] | None = None,
    **options: Any,
) -> list[SizeError]:
    """Approximation error against a method's size, at several lengths, on real q, k, v.

    Args:
        model: the checkpoint that was recorded; it stays as it is.
        key: the variant.
        option: its size option, see `size_option`.
        sizes: values of that option; those of at least the length are left out (there is nothing to approximate), and
            so, with a warning, are those that the method refuses.
        test: length -> layer -> recording on which errors are measured.
        calibration: the same on other documents; each variant chooses its start there. None: as published.
        **options: further options of the variant.

    Returns:
        one row per length and size; none if the size changes nothing (an option for another form of the method).
    """
    rows = []
    for size in sizes:
        for length, recordings in test.items():
            if size >= length:
                continue
            try:
                built = build_layers(model, key, {**options, option: size}, recordings, max_length=length)
            except ValueError as refusal:
                logger.warning("%s with %s=%s is left out: %s", key, option, size, refusal)
                continue
            measured = []
            for layer, recording in recordings.items():
                if calibration is not None:
                    choose_start(built[layer], calibration[length][layer])
                measured.append(output_errors(built[layer], recording))
            error = sum(m.error for m in measured) / len(measured)
            cosine = sum(m.cosine for m in measured) / len(measured)
            rows.append(SizeError(length, size, error, cosine))
    if all(len({row.error for row in rows if row.length == length}) <= 1 for length in test):
        return []
    return sorted(rows, key=lambda row: (row.length, row.size))


def size_for_error(rows: Sequence[SizeError], length: int, error: float) -> float | None:
    """The size at which the error at `length` first falls to `error`, between sizes by its logarithm.

    None where no measured size reaches it, or all of them do.
    """
    curve = sorted((row.size, row.error) for row in rows if row.length == length)
    for (small, above), (large, below) in itertools.pairwise(curve):
        if above >= error >= below and above > below:
            share = (above - error) / (above - below)
            return 2 ** (math.log2(small) + share * (math.log2(large) - math.log2(small)))
    return None
