"""
What the import hook for RL Zoo adds to every start of the interpreter, where the package is installed.

    python benchmarks/zoo_hook.py
"""

import statistics
import subprocess
import sys

STARTS = 50
# The same call that the interpreter makes for each .pth file, in an interpreter that has not run this one yet
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
    print(f"One pass over sb3_mpg_zoo.pth: median {statistics.median(times):.2f} ms, fastest {min(times):.2f} ms")
    if sys.prefix != sys.base_prefix:
        print("In a virtual environment such as this one, Python makes two passes over .pth files at each start")


if __name__ == "__main__":
    main()
