"""`python -m hf_linear_attn` is the command `hf-linear-attn`."""

from hf_linear_attn.cli import app

if __name__ == "__main__":
    app(prog_name="hf-linear-attn")
