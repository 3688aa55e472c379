"""Weights of a checkpoint against the model they are for, before any of them is read or allocated.

Transformers finds tensors that are missing or of another shape while it loads, allocates and initializes them, and
complains afterwards. A damaged config may ask for any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["MisfitError", "check_weights"]

_VARIANT = ".linear_attn."
_FLOATS = {"F64", "F32", "F16", "BF16"}


class MisfitError(ValueError, RuntimeError):
    """The weights of a checkpoint are not those of its config: a `RuntimeError` upstream, a `ValueError` here."""


def check_weights(
    model: Any, state_dict: Mapping[str, Any] | None, files: Sequence[str] | None, ignore_mismatched_sizes: bool
) -> None:
    """Raise unless the tensors of a checkpoint have the shapes of `model`, which is on the meta device.

    Args:
        model: a converted model.
        state_dict: the checkpoint's tensors, or None to read the headers of `files`.
        files: safetensors files; others are left to the loader.
        ignore_mismatched_sizes: whether the checkpoint's own weights may differ in shape; the variants' may not.

    Raises:
        MisfitError: naming the tensors whose shape or kind (float, integer) differs, the variants' tensors that are
            missing.
        ValueError: naming the file that cannot be read.
    """
    held = _described(state_dict, files)
    if held is None:
        return
    prefix = f"{model.base_model_prefix}."
    held = {name.removeprefix(prefix): entry for name, entry in held.items()}
    tied = {name.removeprefix(prefix) for name in model.all_tied_weights_keys}
    missing, problems, resized = [], [], []
    for name, tensor in model.state_dict().items():
        short = name.removeprefix(prefix)
        if short not in held:
            if _VARIANT in name and short not in tied:
                missing.append(name)
            continue
        shape, is_float = held[short]
        if shape != tuple(tensor.shape) and (_VARIANT in name or not ignore_mismatched_sizes):
            problems.append(f"{name} is {list(shape)}, the config asks for {list(tensor.shape)}")
            if _VARIANT not in name:
                resized.append(problems[-1])
        elif _VARIANT in name and is_float != tensor.is_floating_point():
            problems.append(f"{name} holds {'floats' if is_float else 'integers'}")
    if missing:
        problems.insert(0, f"missing keys: {', '.join(missing)}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        more += ". ignore_mismatched_sizes=True starts what differs anew" if problems == resized else ""
        source = files[0] if files else "the given state_dict"
        raise MisfitError(
            f"The weights in {source} do not fit {type(model).__name__}: {'; '.join(problems[:5])}{more}."
        )


def _described(
    state_dict: Mapping[str, Any] | None, files: Sequence[str] | None
) -> dict[str, tuple[tuple[int, ...], bool]] | None:
    """Shape of every tensor and whether it holds floats, or None where that takes reading the file."""
    if state_dict is not None:
        return {name: (tuple(x.shape), x.is_floating_point()) for name, x in state_dict.items()}
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    held = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118
                    entry = reader.get_slice(name)
                    held[name] = tuple(entry.get_shape()), entry.get_dtype() in _FLOATS
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}.") from error
    return held
