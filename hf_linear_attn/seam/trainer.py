"""Checkpoints of Transformers' Trainer that are whole or not there, and steps that are finite or end the run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm.std import tqdm
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

__all__ = ["CheckedTrainer", "NotFiniteError", "last_checkpoint", "remove_checkpoints", "writing"]

_STATE = "trainer_state.json"


class NotFiniteError(ValueError):
    """A loss or a trained weight is not a finite number."""


class CheckedTrainer(Trainer):
    """A `Trainer` that never writes weights which are not finite, and whose last file of a checkpoint is its state.

    Raises:
        NotFiniteError: in `train`, at the step whose loss is not finite (on a GPU at the next time that the loss is
            logged or anything is saved: reading it every step would wait for the device). Checkpoints written before
            stay.
    """

    # never None once a Trainer is made, whatever its annotations allow
    args: Any
    model: Any
    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any
    _finite: torch.Tensor | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with self._bars_closed_on_errors():
            return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with self._bars_closed_on_errors():
            return super().evaluation_loop(*args, **kwargs)

    @contextmanager
    def _bars_closed_on_errors(self) -> Iterator[None]:
        """An error's message begins a line of its own: Trainer closes its progress bars at its regular ends alone."""
        try:
            yield
        except BaseException:
            for callback in self.callback_handler.callbacks:
                for bar in vars(callback).values() if isinstance(callback, ProgressCallback) else ():
                    if isinstance(bar, tqdm):
                        bar.close()
            raise

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        finite = torch.isfinite(loss).all()
        self._finite = finite if self._finite is None else self._finite & finite
        if loss.device.type == "cpu":
            self._check_loss()
        return loss

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Passes over the data that were done, and batches of the one that was not.

        Resumed where its steps are done, a run would take one more; and of data without a length Trainer takes the
        first pass for the whole run: resumed in a later one it would begin that anew.
        """
        found = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return found
        if self.state.global_step >= max_steps:
            return num_train_epochs, 0
        if self.args.ignore_data_skip or has_length(self.train_dataset):
            return found
        passes, share = divmod(self.state.epoch, 1)
        return int(passes), round(share * max_steps * self.args.gradient_accumulation_steps)

    def _check_loss(self) -> None:
        if self._finite is not None and not bool(self._finite):
            raise NotFiniteError(
                f"The loss is not finite at step {self.state.global_step + 1}; no weights were written since the last "
                "checkpoint. Lower the learning rate, or look at the data of this step."
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._check_loss()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def check_finite(self) -> None:
        """Raise `NotFiniteError` unless every loss so far and every trained weight is a finite number."""
        self._check_loss()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not bool(torch.isfinite(parameter.detach()).all()):
                raise NotFiniteError(f"{name} holds numbers that are not finite: nothing is saved")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_finite()
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:  # its state says that it is whole
            (folder / _STATE).unlink(missing_ok=True)
        try:
            with writing(folder):
                super()._save_checkpoint(*args, **kwargs)
        except OSError:
            if self.args.should_save and not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)  # it fills a disk that may be full
            raise

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # The main process writes the trainer's state next: not before every process has written its part.
        self.accelerator.wait_for_everyone()


@contextmanager
def writing(folder: str | Path) -> Iterator[None]:
    """Errors of the libraries that write weights, as the `OSError` that they stand for: a full disk, as a rule."""
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(next(path for path in Path(folder).absolute().parents if path.exists())).free
        raise OSError(f"{str(folder)!r} could not be written ({free // 2**20:,} MiB are free): {error}") from error


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint that a `CheckedTrainer` left in `folder`, or None.

    A process that was killed while it wrote leaves one without a state that can be read; that one is passed over.
    """
    whole = {number: path for number, path in _checkpoints(folder).items() if _is_whole(path)}
    return str(whole[max(whole)]) if whole else None


def remove_checkpoints(folder: str | Path) -> None:
    """Remove the checkpoints that a Trainer left in `folder`."""
    for path in _checkpoints(folder).values():
        (path / _STATE).unlink(missing_ok=True)  # killed here, what is left of it is no whole one
        shutil.rmtree(path)


def _checkpoints(folder: str | Path) -> dict[int, Path]:
    found = {path.name.rpartition("-")[2]: path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {int(number): path for number, path in found.items() if number.isdigit() and path.is_dir()}


def _is_whole(path: Path) -> bool:
    try:
        json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
