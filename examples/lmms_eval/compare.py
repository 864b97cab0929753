"""Compares `foveate eval --out FILE` with what lmms-eval wrote: accuracy, and every answer.

python compare.py results.json LMMS_OUTPUT_FOLDER
"""

# ruff: noqa: T201
from __future__ import annotations

import json
import sys
from pathlib import Path


def main(ours: Path, folder: Path) -> int:
    """0 where both have the same accuracy and the same answers."""
    told = json.loads(ours.read_text(encoding="utf-8"))
    newest = max(folder.rglob("*_samples_foveate_digits.jsonl"), key=lambda path: path.stat().st_mtime)
    samples = [json.loads(line) for line in newest.read_text(encoding="utf-8").splitlines()]
    theirs = {sample["doc_id"]: sample for sample in samples}
    accuracy = sum(sample["accuracy"] for sample in samples) / len(samples)
    print(f"foveate eval: accuracy {told['overall']['accuracy']:.4f} of {told['overall']['n']} questions")
    print(f"lmms-eval:    accuracy {accuracy:.4f} of {len(samples)} questions")
    if sorted(theirs) != list(range(len(told["answers"]))):
        print("they asked different questions")
        return 1
    pairs = [(answer["answer"], theirs[at]["filtered_resps"].strip()) for at, answer in enumerate(told["answers"])]
    different = sum(one != other for one, other in pairs)
    print(f"answers that differ: {different}")
    return int(different > 0 or abs(accuracy - told["overall"]["accuracy"]) > 1e-9)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
