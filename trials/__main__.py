"""Trials that take minutes to hours: `python trials` runs them all, `python trials fuzz stress` some of them.

A trial tries to break what the tests check in seconds: thousands of damaged files, killed processes, hours of training,
every engine of Accelerate. Each is a program of its own, `python trials/NAME.py --help`, and writes its page.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

TRIALS = {
    "engines": "every engine of Accelerate against one process",
    "faults": "trainings that are killed, disks that are full, files that are cut",
    "fuzz": "damaged checkpoints",
    "fuzz_documents": "damaged cards, run logs and configurations",
    "fuzz_pictures": "folders of images at random",
    "mutations": "deliberate faults that the tests must catch",
    "scale": "an estimate of multi-GPU cost, checked on this machine",
    "stress": "long trainings, threads, data loaders",
    "two_writers": "two processes that write into one folder",
}


def main() -> None:
    """Run trials one after the other, and say which failed."""
    listed = "\n".join(f"  {name:15} {what}" for name, what in TRIALS.items())
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python trials", description=f"{__doc__}\n{listed}", formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="those to run; all if none is given")
    names = parser.parse_args().names or list(TRIALS)
    if unknown := sorted(set(names) - set(TRIALS)):
        parser.error(f"unknown trials: {', '.join(unknown)}; there are {', '.join(TRIALS)}")
    failed = []
    for name in names:
        start = time.monotonic()
        status = subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py")]).returncode
        failed += [name] if status else []
        print(f"{name}: {f'failed, exit status {status}' if status else 'passed'}, {time.monotonic() - start:.0f} s")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
