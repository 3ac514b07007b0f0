"""What a command costs as a whole process, against Python itself and against what loading a model needs.

Run: ``python benchmarks/startup.py [--rounds N]``. The commands take turns; medians of whole-process wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import median, report

PROMPT = "Hello there. General Kenobi, you are a bold one."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), options.rounds)


def run(directory: Path, rounds: int) -> None:
    python, promptdb = [sys.executable], [str(Path(sys.executable).with_name("promptdb"))]
    store, model = str(directory / "store.promptdb"), str(directory / "model")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PROMPTDB_PATH": store, "PROMPTDB_MODEL": model}

    def call(*command: str) -> str:
        return subprocess.run(command, check=True, env=env, capture_output=True, text=True).stdout

    call(*promptdb, "demo-model", model, "--arch", "gpt2")
    call(*promptdb, "put", PROMPT)
    assert json.loads(call(*promptdb, "get", "--json", PROMPT))["is_complete"]
    commands = {
        "python -c pass": [*python, "-c", "pass"],
        "promptdb --help": [*promptdb, "--help"],
        "promptdb get (stored prompt)": [*promptdb, "get", PROMPT],
        "promptdb stat": [*promptdb, "stat"],
        "import torch": [*python, "-c", "import torch"],
        "import transformers": [*python, "-c", "import transformers"],
        "import GPT2LMHeadModel": [*python, "-c", "from transformers import GPT2LMHeadModel"],
    }
    samples: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            call(*command)
            samples[name].append(time.perf_counter() - began)
    seconds = {name: median(taken[1:]) for name, taken in samples.items()}
    bare, model_class = seconds["python -c pass"], seconds["import GPT2LMHeadModel"]
    targets = {"promptdb --help": "< 0.2 s more", "promptdb get (stored prompt)": "< 0.6 s more, >= 10x faster"}
    report(
        "startup",
        [
            {
                "command": name,
                "seconds": round(taken, 3),
                "more than python (s)": round(taken - bare, 3),
                "faster than the model's class": round(model_class / taken, 1),
                "target": targets.get(name, ""),
            }
            for name, taken in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
