"""make torture ROWS="kill disk"  (the rows whose names hold one of these words; without ROWS all of them)"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

from torture import damage, disks, fuzz, hostile, kills, launchers  # noqa: E402, F401
from torture.rows import ROWS, run_rows, to_table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", help="Words in the names of rows.")
    parser.add_argument("--num_processes", type=int, default=2, help="Rows that run at the same time.")
    parser.add_argument("--limit", type=int, help="Most tries of each row.")
    options = parser.parse_args()
    names = [name for name in ROWS if not options.rows or any(word in name for word in options.rows)]
    if not names:
        parser.error(f"`rows` must hold words of {', '.join(ROWS)}, got {options.rows}.")
    outcomes = []
    for outcome in run_rows(names, options.num_processes, options.limit):
        outcomes.append(outcome)
        print(
            f"{outcome.name}: {outcome.num_tries} tries, {len(outcome.losses)} lost, {outcome.seconds:.0f} s",
            flush=True,
        )
    print(f"\n{platform.platform()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}: {' '.join(sys.argv)}\n")
    print(to_table(outcomes))
    sys.exit(any(outcome.losses for outcome in outcomes))


if __name__ == "__main__":
    main()
