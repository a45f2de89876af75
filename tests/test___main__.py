"""The program by the name of the package."""

import subprocess
import sys


def test_the_package_is_the_program():
    for command, status, words in (("--help", 0, "Make a small model 1-bit"), ("pakc", 2, "Did you mean 'pack'")):
        done = subprocess.run([sys.executable, "-m", "proxbit", command], capture_output=True, text=True)
        assert done.returncode == status and words in done.stdout + done.stderr
