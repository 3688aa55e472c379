"""The version matrix: `nox` runs the test-suite under versions that the package allows, `nox -l` lists them.

Every session is a make target with an environment of its own; what is installed and which tests run stands in the
Makefile. Needs nox (`pipx run nox`) and the Pythons that a session names.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.sessions = ["suite"]
TORCH = {"2.11": "torch==2.11.0", "newest": "torch"}
# Triton and NumPy of PyTorch 2.11: as in .ci/oldest.txt.
BESIDE = {"2.11": ["torch==2.11.0", "triton==3.6.0", "numpy<2.4"], "newest": []}
TRANSFORMERS = {
    "5.17": ["transformers==5.17.0"],
    "5.23": ["transformers==5.23.0"],
    "newest": [],
    "main": ["transformers @ git+https://github.com/huggingface/transformers"],
}
MATRIX = [(transformers, torch) for transformers in ("5.17", "5.23", "newest") for torch in TORCH]


def make(session: nox.Session, target: str, python: str, transformers: str, torch: str) -> str:
    """One target of the Makefile under these versions; returns its environment."""
    environment = f".nox/py{python}-transformers{transformers}-torch{torch}"
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text("\n".join(TRANSFORMERS[transformers] + BESIDE[torch]) + "\n")
    session.run(
        *("make", target, f"PYTHON=python{python}", f"VENV={environment}"),
        *(f"TORCH={TORCH[torch]}", f"CONSTRAINTS={constraints.resolve()}", *session.posargs),
        external=True,
    )
    return environment


@nox.session(venv_backend="none")
@nox.parametrize("python_version", ["3.10", "3.12", "3.13"])
@nox.parametrize(("transformers", "torch"), MATRIX)
def suite(session: nox.Session, transformers: str, torch: str, python_version: str) -> None:
    """The whole test-suite and the notebooks: `make test-all`."""
    make(session, "test-all", python_version, transformers, torch)


@nox.session(venv_backend="none")
@nox.parametrize("transformers", ["newest", "main"])
@nox.parametrize("target", ["doctor", "test-all"])
def nightly(session: nox.Session, target: str, transformers: str) -> None:
    """`make doctor` and `make test-all` under the newest of everything, and under Transformers' main."""
    make(session, target, "3.12", transformers, "newest")


@nox.session(venv_backend="none")
def without_triton(session: nox.Session) -> None:
    """`make test` where Triton is not installed: what needs it is refused by name or skipped."""
    given = "3.12", "newest", "newest"
    environment = make(session, "doctor", *given)
    session.run(f"{environment}/bin/python", "-m", "pip", "uninstall", "--yes", "triton", external=True)
    make(session, "test", *given)
