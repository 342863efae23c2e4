"""
How long the import hook for RL Zoo takes at each start of the interpreter, where the package is installed.

    python benchmarks/zoo_hook.py

Writes results/zoo_hook.csv. Virtual environments double the time, as Python reads their .pth files twice.
"""

import statistics
import subprocess
import sys

from tables import RESULTS, print_table, write_csv

STARTS = 50
# The interpreter makes the same call for each .pth file. The hook is removed first, as if this file had not been read yet
MEASURE = """
import site, sys, sysconfig, time
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "SB3MPGZooHook"]
folder = sysconfig.get_path("purelib")
start = time.perf_counter()
site.addpackage(folder, "sb3_mpg_zoo.pth", set())
print(time.perf_counter() - start)
assert type(sys.meta_path[0]).__name__ == "SB3MPGZooHook", "the package is not installed here, or the hook is switched off"
"""


def main() -> None:
    times = []
    for _ in range(STARTS):
        output = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True).stdout
        times.append(1e3 * float(output))
    low, median, high = statistics.quantiles(times, n=4)
    row = {
        "what": "one pass over sb3_mpg_zoo.pth",
        "unit": "ms",
        "median": f"{median:.3g}",
        "first quartile": f"{low:.3g}",
        "third quartile": f"{high:.3g}",
        "fastest": f"{min(times):.3g}",
    }
    print_table([row])
    write_csv(RESULTS / "zoo_hook.csv", [row])


if __name__ == "__main__":
    main()
