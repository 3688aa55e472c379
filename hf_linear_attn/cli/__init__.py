"""Floor 9: the command line. Commands parse arguments and print; what they do lives on the floors below."""

import hf_linear_attn.cli.bench_commands
import hf_linear_attn.cli.measure_commands  # noqa: F401 (these add their commands)
from hf_linear_attn.cli.commands import app

__all__ = ["app"]
