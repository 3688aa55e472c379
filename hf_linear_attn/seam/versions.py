"""Versions of Transformers that the package was tested with, and the sentence for one that is newer."""

from __future__ import annotations

import transformers
from packaging.version import Version
from transformers.utils import logging

__all__ = ["NEWEST_TESTED", "OLDEST_TESTED", "say_if_untested"]

OLDEST_TESTED = "5.17.0"
NEWEST_TESTED = "5.24.0"

logger = logging.get_logger(__name__)


def say_if_untested(installed: str = transformers.__version__) -> None:
    """Warn once if this Transformers is newer than the newest one tested.

    Args:
        installed: its version.
    """
    if Version(installed) > Version(NEWEST_TESTED):
        logger.warning_once(
            f"hf_linear_attn was tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}; this is {installed}. "
            "`hf-linear-attn doctor` tries in a minute whether what the package relies on still holds."
        )
