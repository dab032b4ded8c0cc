"""Time what `import anyattn` adds to `import torch`, in fresh processes, bytecode cached; milliseconds.

python benchmarks/import_time.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

CODE = """
import torch, time
start = time.perf_counter()
import anyattn
print((time.perf_counter() - start) * 1e3)
"""


def main() -> None:
    """Run, and print the median and the spread."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    # A package is installed with its bytecode; the first process writes it where there is none yet.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(options.rounds + 1):
        done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
        times.append(float(done.stdout))
    times = sorted(times[1:])
    print(f"median {statistics.median(times):.1f} ms, from {times[0]:.1f} to {times[-1]:.1f}")


if __name__ == "__main__":
    main()
