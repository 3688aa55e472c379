"""Writes the table of docs/export.md: exports every encoder variant, runs it at other shapes, compares with eager.

python .ci/export.py          # all variants, a quarter of an hour on one core
python .ci/export.py linear   # these rows only; the others stay
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from hf_linear_attn import get_variant, list_variants  # noqa: E402
from hf_linear_attn.cli.listing import exported_form  # noqa: E402
from tests.exporting import encoder, export, largest_error, onnx_session  # noqa: E402

PAGE = ROOT / "docs" / "export.md"
VARIANTS = [key for key in list_variants(encoder=True) if get_variant(key).any_length]
BEGIN, END = "<!-- table: .ci/export.py -->\n", "<!-- end -->\n"
HEAD = "| variant | computes | torch.export | with a mask | ONNX | with a mask |\n|---|---|---|---|---|---|\n"


def row(variant: str) -> str:
    """The row of a variant: largest errors without a mask and with one."""
    model, errors = encoder(variant), {}
    for masked in (False, True):
        program = export(model, masked=masked)
        errors["export", masked] = largest_error(model, program.module(), masked=masked)
        errors["onnx", masked] = largest_error(model, onnx_session(program), masked=masked)
    cells = [f"{errors[kind, masked]:.1e}" for kind in ("export", "onnx") for masked in (False, True)]
    return " | ".join([f"| `{variant}`", exported_form(get_variant(variant)), *cells]) + " |\n"


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    before, rest = PAGE.read_text().split(BEGIN)
    table, after = rest.split(END)
    rows = {name: line for line in table.splitlines(keepends=True) for name in re.findall(r"^\| `(\w+)` \|", line)}
    for variant in sys.argv[1:] or VARIANTS:
        rows[variant] = row(variant)
        print(rows[variant], end="", flush=True)
        lines = [rows[name] for name in VARIANTS if name in rows]
        PAGE.write_text(before + BEGIN + HEAD + "".join(lines) + END + after)


if __name__ == "__main__":
    main()
