"""Silence for the libraries' own small progress bars and reports."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_libraries"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the libraries' own small progress bars, and Transformers' report that a head is new: where a recipe trains
    one, it always is."""
    from datasets.utils import logging as datasets_logging
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled(), datasets_logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets_logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars[0]:
            logging.enable_progress_bar()
        if bars[1]:
            datasets_logging.enable_progress_bar()
