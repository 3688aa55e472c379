"""Measure make targets as a new user meets them, for README.md: `python3 .ci/time.py demo test`.

Each runs in its own fresh clone of HEAD, from no environment to the end; the seconds go to .ci/times.json. What the
demo measured in that run is kept as recipes/results/minilm_sotu_demo.json and .png.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "recipes" / "results" / "minilm_sotu_demo"
TIMES = ROOT / ".ci" / "times.json"


def measure(target: str) -> float:
    """Seconds of `make target` in a fresh clone.

    Raises:
        subprocess.CalledProcessError: when it fails: a failed run has no time.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
        start = time.monotonic()
        subprocess.run(["make", target], cwd=folder, check=True)
        seconds = time.monotonic() - start
        measured = Path(folder) / "outputs" / "demo"
        if measured.is_dir():
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(measured / "results.json", KEPT.with_suffix(".json"))
            shutil.copyfile(measured / "report.png", KEPT.with_suffix(".png"))
        return seconds


def main() -> None:
    """Measure the targets named on the command line and update the file."""
    times = json.loads(TIMES.read_text()) if TIMES.is_file() else {}
    machine = f"{os.cpu_count()} CPU cores, {platform.system()}, Python {platform.python_version()}"
    for target in sys.argv[1:]:
        times[target] = {"seconds": round(measure(target)), "machine": machine}
        TIMES.write_text(json.dumps(times, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
