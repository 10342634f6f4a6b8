"""How long each file of tests takes, as it was measured: durations.json, by which conftest.py orders them.

`python -m netns_tests.durations REPORT` writes it anew from a report in JUnit's format; `make durations` makes one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = Path(__file__).with_suffix(".json")


def read() -> dict[str, float]:
    """Seconds by `name_of` a file."""
    seconds: dict[str, float] = json.loads(FILE.read_text())
    return seconds


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).with_suffix("").as_posix()


def measured(report: Path) -> dict[str, float]:
    """The longest first. A class of tests is part of its module's name in the report."""
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        parts = case.get("classname", "").split(".")
        while parts and not (REPOSITORY / Path(*parts)).with_suffix(".py").exists():
            parts.pop()
        if parts:  # else it was interrupted
            seconds["/".join(parts)] += float(case.attrib["time"])  # type: ignore[assignment]
    return {name: round(each, 1) for name, each in seconds.most_common()}


if __name__ == "__main__":
    (path,) = map(Path, sys.argv[1:])
    FILE.write_text(json.dumps(measured(path), indent=0) + "\n")
