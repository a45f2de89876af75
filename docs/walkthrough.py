"""Writes the page of a first hour, `walkthrough.md`: `python docs/walkthrough.py [--bin FOLDER]`, a few minutes.

Every command runs in a process of its own, and the page shows what it printed. The Hub is that of the tests, on this
machine; the last step has a cache of its own, as another machine would.
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import running  # noqa: E402

RELEASE, REPOSITORY = "runs/digits/digits-vit-1bit", "me/digits-vit-1bit"
CLASSIFY = f"""\
import proxbit
from transformers import pipeline

classify = pipeline("image-classification", model="{REPOSITORY}")
for answer in classify("runs/digits/samples/7.png", top_k=2):
    print(answer)
"""
# What is done, with which command; a text that is no command is a program.
STEPS = {
    "A model becomes 1-bit and goes to work. It came with the package, and needs no network.": "proxbit demo",
    "Train one: float, then 1-bit with distillation, then packed, as a release.": "python examples/train_digits.py",
    "The float model of before, binarized from unlabelled pictures instead of trained.": (
        "proxbit binarize runs/digits/digits-float --images runs/digits/pictures --labels --output_dir fitted"
    ),
    "What the trained one is made of.": f"proxbit summary {RELEASE}",
    "A page about its training, to be opened in a browser.": "proxbit report runs/digits/latent",
    "To the Hub.": f"proxbit push {RELEASE} {REPOSITORY}",
    "And on another machine.": CLASSIFY,
}
HEAD = """# A first hour

Written by `python docs/walkthrough.py`, which ran these commands one after the other and shows what each of them
printed. The Hub was one on the same machine, and `me` the name of a user there; the last step had an empty cache.
"""
# Bars of progress, warnings of dependencies, and what differs from run to run.
NOISE = re.compile(
    r"^.*(?:it/s|\\r|Warning|warn|Failed to load|W\d{4} |'loss'|'train_|'eval_|\|\s*\d+/\d+).*\n?", re.MULTILINE
)


def shown(output: str, hub: str, folder: str) -> str:
    """What a command printed, as it is shown."""
    text = NOISE.sub("", output).replace(hub, "https://huggingface.co").replace(f"{folder}/", "")
    lines = (line.rstrip() for line in text.splitlines())
    return "\n".join(lines).strip("\n")


def run(command: str, environment: dict[str, str]) -> str:
    """One step: a command line, or the text of a program."""
    line = ["python", "-c", command] if "\n" in command else command.split()
    done = subprocess.run(line, cwd=environment["PWD"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")
    return done.stdout


def write(target: Path, binaries: Path) -> None:
    """Take every step, and write the page."""
    parts = [HEAD]
    with running() as hub, TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        for number, (words, command) in enumerate(STEPS.items()):
            home = Path(folder) / ("another" if number == len(STEPS) - 1 else "home")
            environment = hub.environment(home, "hf_me", COLUMNS="100", NO_COLOR="1", PWD=folder)
            environment["PATH"] = f"{binaries}:{environment['PATH']}"
            output = shown(run(command, environment), hub.url, folder)
            code = (
                f"```py\n{command}```\n\n```text\n{output}" if "\n" in command else f"```console\n$ {command}\n{output}"
            )
            parts.append(f"{words}\n\n{code}\n```\n")
    target.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent, help="where python and proxbit are")
    write(ROOT / "docs" / "walkthrough.md", parser.parse_args().bin)
