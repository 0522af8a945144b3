"""Makes the golden runs and writes golden.json: ``python -m tests.golden``, on an otherwise unchanged checkout.

Numbers may only change on purpose: the new file goes into the commit that changes them, which says why they do.
"""

from __future__ import annotations

import json

from tests.golden.runs import FILE, RUNS, made_with, make


def main() -> None:
    runs = {}
    for name in RUNS:
        print(name, flush=True)
        runs[name] = make(name)
    FILE.write_text(json.dumps({"made_with": made_with(), "runs": runs}, indent=1) + "\n")
    print(f"written to {FILE}")


if __name__ == "__main__":
    main()
