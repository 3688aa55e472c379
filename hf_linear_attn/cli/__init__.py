"""Floor 9: the command line. Commands parse arguments and print; what they do lives on the floors below."""

from hf_linear_attn.cli.commands import app

__all__ = ["app"]
