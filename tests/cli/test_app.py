"""The program as a whole: its commands, what it imports, and how it refuses; in a terminal and in a pipe."""

import errno
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import sysconfig
import termios
import warnings
from importlib import import_module
from inspect import getdoc
from pathlib import Path

import pytest
from typer.testing import CliRunner

import proxbit.cli
from picture_folders import odd_folder, tiny_classifier
from proxbit.cli.app import app, main
from proxbit.errors import LossError
from proxbit_cli import COMMANDS

NO_COMMANDS = {"__init__", "app", "checkpoints", "images", "progress", "terminal"}
DEMO = Path(proxbit.__file__).parent / "demo" / "digits"
# Many commands in one process, each with its exit status behind it.
SESSION = """
import sys
from proxbit_cli import main
for line in sys.argv[1:]:
    sys.argv = ["proxbit", *line.split("|")]
    try:
        main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    print(f"=== {status}", flush=True)
    print("===", file=sys.stderr, flush=True)
"""


def in_a_terminal(code, *arguments):
    """What a terminal of 80 columns shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**environment, "TERM": "xterm-256color"}
    ) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # The other side is closed.
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def plain(text):
    """Without colors and bars: a line is what is left of it when it has been overwritten."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    return "\n".join(line.rpartition("\r")[2] for line in text.split("\n"))


@pytest.fixture(scope="module")
def session(tmp_path_factory, photographs):
    """What a terminal shows of several commands, with colors."""
    folder = tmp_path_factory.mktemp("terminal")
    model, data = tiny_classifier(folder / "model"), odd_folder(folder / "photos", photographs)
    commands = {
        "demo": ["demo"],
        "evaluate": ["evaluate", str(model), str(data)],
        "train help": ["train", "--help"],
        "mistake": ["summary", str(folder / "nowhere")],
        "taken": ["unpack", str(DEMO), str(folder)],
    }
    shown = in_a_terminal(SESSION, *("|".join(command) for command in commands.values()))
    parts = re.split(r"=== (\d+)\n===\n", shown)
    assert len(parts) == 2 * len(commands) + 1
    return {name: (parts[2 * i], int(parts[2 * i + 1])) for i, name in enumerate(commands)}


def test_help_needs_neither_torch_nor_transformers():
    """In a terminal, with every command on a line of its own."""
    code = (
        "import sys; from proxbit_cli import main; sys.argv = ['proxbit', '--help']\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code\n"
        "assert not {'torch', 'transformers', 'proxbit', 'numpy'} & set(sys.modules)"
    )
    shown = plain(in_a_terminal(code))
    assert max(map(len, shown.splitlines())) <= 80
    for name, text in COMMANDS.items():
        assert re.search(rf"^│ {name} +{re.escape(text)} +│$", shown, re.MULTILINE), name


def test_the_program_that_is_installed():
    program = Path(sysconfig.get_path("scripts")) / "proxbit"
    for command, status, words in (("--help", 0, "Make a small model 1-bit"), ("pakc", 2, "Did you mean 'pack'")):
        done = subprocess.run([program, command], capture_output=True, text=True)
        assert done.returncode == status and words in done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_line_and_an_example(name):
    command = getattr(import_module(f"proxbit.cli.{name}"), name)
    text = getdoc(command)
    assert text.splitlines()[0] == COMMANDS[name]
    assert f"\n\nExample: proxbit {name}" in text
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and f"Example: proxbit {name}" in shown.output
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "…" not in shown.output


def test_every_file_is_a_command_of_the_program():
    files = {file.stem for file in Path(proxbit.cli.__file__).parent.glob("*.py")}
    assert files - NO_COMMANDS == set(COMMANDS)


def test_a_typing_mistake_gets_a_hint():
    done = CliRunner().invoke(app, ["summery"])
    assert done.exit_code == 2 and "Did you mean 'summary'?" in done.output


def test_a_refusal_is_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path):
    """Brackets in the message are text, not markup."""
    monkeypatch.setattr(sys, "argv", ["proxbit", "plot", "[red]bnn+++", "--out", str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "Error: Unknown quantizer pair '[red]bnn+++'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_one_line_too(monkeypatch, capsys, tmp_path):
    """The file system has the last word: a disk that is full, or read-only, looks like a good one before."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x.png"))

    monkeypatch.setattr(sys, "argv", ["proxbit", "env"])
    monkeypatch.setattr("proxbit.cli.env.environment", full)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    shown = capsys.readouterr().err
    assert "No space left on device" in shown and "x.png" in shown and shown.count("\n") == 1


def test_what_is_added_to_an_error_is_in_its_line(monkeypatch, capsys):
    """Such as the checkpoint that a training can be resumed from."""

    def stop():
        error = LossError("The loss is NaN.")
        error.add_note("Training stopped at step 3 of 6.")
        raise error

    monkeypatch.setattr(sys, "argv", ["proxbit", "env"])
    monkeypatch.setattr("proxbit.cli.env.environment", stop)
    with pytest.raises(SystemExit):
        main()
    assert "Error: The loss is NaN. Training stopped at step 3 of 6.\n" in capsys.readouterr().err


def test_a_fault_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["proxbit", "env"])
    monkeypatch.setattr("proxbit.cli.env.environment", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize("name", ["mistake", "taken"])
def test_mistakes_in_a_terminal(session, name):
    shown, status = session[name]
    assert status == 2
    assert "Traceback" not in shown and len(re.findall("^Error: ", plain(shown), re.MULTILINE)) == 1


def test_nothing_is_wider_than_the_terminal(session):
    """But messages, which the terminal wraps by itself."""
    for name in ("demo", "evaluate", "train help"):
        shown, status = session[name]
        tables = [line for line in plain(shown).splitlines() if line.startswith(tuple("│┃╭╰┌└├"))]
        assert status == 0 and tables and max(map(len, tables)) <= 80, name


def test_the_demo_draws_in_colors(session):
    shown, _ = session["demo"]
    assert shown.count("▀") >= 10 * 12 * 6
    assert "\x1b[38;2;" in shown or "\x1b[38;5;" in shown


def test_evaluate_in_a_terminal(session):
    shown, _ = session["evaluate"]
    assert "2 left out:" in shown and "cut.jpg: " in shown and "text.jpg: not an image" in shown


def test_a_warning_is_one_line_without_the_code_that_it_came_from(monkeypatch, capsys):
    def command():
        warnings.warn("for programmers", DeprecationWarning, stacklevel=2)
        warnings.warn("soft\x1b[2J [bold]at[/] mu", UserWarning, stacklevel=2)

    monkeypatch.setattr("proxbit_cli.app", command)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        main()
    assert capsys.readouterr().err == "Warning: soft\\x1b[2J [bold]at[/] mu\n"
