"""Break the code on purpose, one spot at a time, and see whether the tests notice: `python .ci/mutants.py <results>`.

Mutmut's operators say what a change may be: a number, a comparison, an argument left out, None assigned. Its runner is
not used: it passes over decorated functions, which backward passes are. Here the change is made in a copy of the
repository, and a process that has imported the libraries forks one that runs the tests there. TRUST_SEED draws
TRUST_MUTANTS lines, and one change for each. What was tried is kept beside the results; a change is tried again once
its file or its tests read otherwise.
"""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
TARGETS = ("convert.py", "config.py", "seam/*.py", "ops/*/*.py")
IN_OPS = re.compile("mask|backward|gradient")  # of ops: lines and functions with these names
# By name, `ops/window/tail.py` has tests/ops/window, and `seam/limits.py` has tests/test_limits.py. Others:
TESTS = {
    "cache": ["test_generation.py"],
    "config": ["test_config.py", "test_own_feature_maps.py"],
    "convert": ["test_convert.py", "test_redraw.py", "test_calibration.py"],
    "checkpointing": ["test_trainer.py"],
    "facts": ["test_doctor.py"],
    "family_facts": ["test_doctor.py"],
    "head_slots": ["variants/test_linformer.py"],
    "generating": ["test_generation.py"],
    "heads": ["test_global_tokens.py"],
    "initialization": ["test_reinit.py", "test_composites.py"],
    "places": ["test_surgery.py"],
    "sharing": ["test_layer_choice.py"],
    "tiny": ["test_doctor.py"],
    "trainer": ["training/test_safety.py", "training/test_stage.py"],
    "versions": ["test_doctor.py"],
    "weights": ["test_saving.py", "test_damaged_checkpoints.py", "test_auto.py"],
}
BROADER = ["tests/test_model_contract.py"]  # for changes that those do not notice
IMPORTED = ("torch", "transformers.trainer", "peft", "hypothesis", "pytest")  # before the fork
MARKS = "not slow and not heavy and not gpu and not conformance"
OPTIONS = ["-m", MARKS, "-xq", "--tb=line", "-pno:cacheprovider", "-otimeout=0"]
DEFAULTS = {"TRUST_MUTANTS": "60", "TRUST_SEED": "0", "WORKERS": "2"}
STAMPS = itertools.count(10**9)  # times of changed files
CPU_SECONDS, SECONDS, MEMORY = 400, 3600, 12 << 30  # that one run of the tests may take


class Mutant(NamedTuple):
    """A change: where, the line before and after, the whole file with it, and the tests that ought to notice."""

    path: str
    line: int
    before: str
    after: str
    text: str
    tests: Sequence[str]

    def key(self) -> str:
        """Of what the outcome rests on: this file and the tests."""
        named = [path for name in self.tests for path in sorted((ROOT / name).glob("*.py")) or [ROOT / name]]
        texts = [self.path, self.text, *(path.read_text(encoding="utf-8") for path in named)]
        return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def passed_over(node: cst.CSTNode) -> bool:
    """Types, what is said to people, what a module exports, and `strict` of a `zip`, whose parts are equally long."""
    if isinstance(node, cst.SimpleString):
        return " " in node.value
    if isinstance(node, cst.Arg):
        return node.keyword is not None and node.keyword.value == "strict"
    if isinstance(node, cst.Assign):
        return getattr(node.targets[0].target, "value", None) == "__all__"
    return isinstance(node, cst.Annotation | cst.Raise | cst.FormattedString | cst.ImportFrom)


class Changes(cst.CSTVisitor):
    """Finds every change of a file that is not passed over."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, lines: list[str], wanted: re.Pattern[str]) -> None:
        super().__init__()
        self.lines, self.wanted, self.around = lines, wanted, [""]
        self.found: dict[int, list[tuple[cst.CSTNode, cst.CSTNode]]] = {}

    def on_visit(self, node: cst.CSTNode) -> bool:
        if passed_over(node):
            return False
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.around.append(node.name.value)
        place = self.get_metadata(PositionProvider, node, None)
        if place and self.wanted.search(" ".join([*self.around, self.lines[place.start.line - 1]])):
            changes = [new for kind, operator in mutation_operators if isinstance(node, kind) for new in operator(node)]
            if changes and getattr(getattr(node, "func", None), "value", None) != "zip":
                self.found.setdefault(place.start.line, []).extend((node, new) for new in changes)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.FunctionDef | cst.ClassDef):
            self.around.pop()


def tests_of(path: Path) -> list[str]:
    """The tests that ought to notice a change in a file of the package."""
    if "ops" in path.parts and path.stem not in TESTS:
        folder = Path("tests", *path.parts[1:-1])
        own = folder / f"test_{path.name}"
        return [str(tests) for tests in (own, folder) if (ROOT / tests).exists()]
    return [f"tests/{name}" for name in TESTS.get(path.stem, [f"test_{path.stem}.py"])]


def sample(count: int, seed: int) -> Iterator[Mutant]:
    """As many changes, of as many lines, drawn from all lines of TARGETS; the first ones of a larger sample."""
    places = []
    for path in sorted(path for target in TARGETS for path in (ROOT / "hf_linear_attn").glob(target)):
        source = path.read_text(encoding="utf-8")
        wrapper = MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
        finder = Changes(source.splitlines(), IN_OPS if "ops" in path.parts else re.compile(""))
        wrapper.visit(finder)
        places += [(path.relative_to(ROOT), wrapper.module, line, changes) for line, changes in finder.found.items()]
    draw = random.Random(seed)
    draw.shuffle(places)
    for path, module, _, changes in places[:count]:
        node, changed = draw.choice(changes)
        text = module.deep_replace(node, changed).code
        pairs = enumerate(zip(module.code.splitlines(), text.splitlines(), strict=False), 1)
        line, (before, after) = next((line, pair) for line, pair in pairs if pair[0] != pair[1])
        yield Mutant(path.as_posix(), line, before.strip(), after.strip(), text, tests_of(path))


def run_tests(tests: Sequence[str]) -> tuple[str, str | None]:
    """How the tests end in the working folder, a copy of the repository, and which one failed.

    Returns:
        'survived' (all passed), 'killed' or 'timed out'; a test, where one said that it failed.
    """
    log = Path("tests.log")
    child = os.fork()
    if not child:
        status = 1
        with suppress(BaseException):
            os.setsid()
            sys.path.insert(0, os.getcwd())
            os.environ["PYTHONPATH"] = os.getcwd()
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 9))  # of a loop without end
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            status = importlib.import_module("pytest").main([*OPTIONS, *tests])
        os._exit(status)
    last, ended = time.monotonic() + SECONDS, (0, 0)
    while not ended[0] and time.monotonic() < last:
        time.sleep(0.1)
        ended = os.waitpid(child, os.WNOHANG)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what the tests left running
    if not ended[0]:
        os.waitpid(child, 0)
    if not ended[0] or os.WTERMSIG(ended[1]) == signal.SIGXCPU:
        return "timed out", None
    said = log.read_text(encoding="utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", said, flags=re.MULTILINE)
    return ("killed" if ended[1] else "survived"), failed and failed[1]


def prepare(folder: str) -> None:
    """Give this worker a copy of the repository as its working folder, and import what every run of the tests does."""
    copy = tempfile.mkdtemp(dir=folder)
    ignored = shutil.ignore_patterns(".git", ".venv*", ".nox", ".*_cache", "__pycache__", "outputs", "site")
    shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
    os.chdir(copy)
    for name in IMPORTED:
        importlib.import_module(name)


def attempt(mutant: Mutant) -> dict[str, Any]:
    """What becomes of a change, by which test, and in how many seconds."""
    start, path = time.monotonic(), Path(mutant.path)
    path.write_text(mutant.text, encoding="utf-8")
    os.utime(path, (next(STAMPS),) * 2)  # bytecode goes by seconds and size: each change has its own
    outcome, by = run_tests(mutant.tests)
    if outcome == "survived":
        outcome, by = run_tests(BROADER)
    shutil.copy2(ROOT / mutant.path, path)
    facts = {name: value for name, value in mutant._asdict().items() if name != "text"}
    seconds = round(time.monotonic() - start, 1)
    return {**facts, "outcome": outcome, "by": by, "seconds": seconds, "key": mutant.key()}


def main() -> None:
    """Try the sample, and write what became of it to the file that the command line names.

    Raises:
        SystemExit: where tests that noticed a change fail without one.
    """
    results = Path(sys.argv[1])
    count, seed, workers = (int(os.environ.get(name, default)) for name, default in DEFAULTS.items())
    mutants = {mutant.key(): mutant for mutant in sample(count, seed)}
    kept = results.with_suffix(".rows.jsonl")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a+", encoding="utf-8") as file, tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        file.seek(0)
        rows = {row["key"]: row for row in map(json.loads, file) if row["key"] in mutants}
        fork = multiprocessing.get_context("fork")
        # Not a multiprocessing.Pool: its workers are daemons, in which tests may not start processes.
        with ProcessPoolExecutor(workers, fork, prepare, (folder,)) as pool:
            tried = [pool.submit(attempt, mutant) for key, mutant in mutants.items() if key not in rows]
            for done in as_completed(tried):
                row = done.result()
                rows[row["key"]] = row
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{row['outcome']}: {row['path']}:{row['line']}: {row['after']}", flush=True)
            noticed = sorted({row["by"] for row in rows.values() if row["by"]})
            outcome, failed = pool.submit(run_tests, noticed).result()
    if outcome != "survived":
        sys.exit(f"{failed} fails without any change: what it is said to notice means nothing.")
    outcomes = Counter(row["outcome"] for row in rows.values())
    alive = [row for row in rows.values() if row["outcome"] == "survived"]
    found = {
        "seed": seed,
        "changes": len(rows),
        **{outcome: outcomes[outcome] for outcome in ("killed", "timed out", "survived")},
        "alive": [
            {"place": f"{row['path']}:{row['line']}", "before": row["before"], "after": row["after"]}
            for row in sorted(alive, key=lambda row: (row["path"], row["line"]))
        ],
        "seconds": round(sum(row["seconds"] for row in rows.values()) / workers),
    }
    results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
