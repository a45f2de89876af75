"""Trainings in processes of their own that something happens to; `faults.py`, `two_writers.py` and tests share them.

Processes are forked from a server that has imported everything once. What a process says goes to a file.
"""

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

import proxbit
from proxbit.hub.release import write_release
from proxbit.nn import latent_layers
from proxbit.training import ProxConnectArguments, ProxConnectTrainer, checkpoints, saving

STEPS, EVERY, FAULT_STEP = 6, 2, 4
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.scandir", "os.listdir"}
CONTEXT = multiprocessing.get_context("forkserver")
# By names of packages: the server does not know the folder of this file.
CONTEXT.set_forkserver_preload(["proxbit.training", "transformers.models.vit.modeling_vit"])
HANGS = 90


def make_config() -> ViTConfig:
    """A tiny ViT with dropout."""
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTConfig(**sizes, intermediate_size=28, num_labels=3, hidden_dropout_prob=0.1)


def make_trainer(folder: Path, **changes: Any) -> ProxConnectTrainer:
    """A tiny ViT with dropout, eight pictures, six steps; a checkpoint every two, and a log at each."""
    torch.manual_seed(0)
    model = proxbit.binarize(ViTForImageClassification(make_config()))
    pictures = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    args = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": EVERY}
    args |= {"per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 1e-2}
    return ProxConnectTrainer(
        model=model,
        args=ProxConnectArguments(str(folder), **args | changes),
        train_dataset=[{"pixel_values": picture, "labels": i % 3} for i, picture in enumerate(pictures)],
    )


def outcome(trainer: ProxConnectTrainer) -> dict[str, Any]:
    """What a training has made, to the last bit."""
    names = ("step", "loss", "grad_norm", "learning_rate", "mu", "flip_ratio", "hardening_gap")
    logs = [{name: entry[name] for name in names} for entry in trainer.state.log_history if "loss" in entry]
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "weights": _digest(trainer.model.state_dict()),
        "optimizer": _digest({f"{i}.{name}": each[name] for i, each in optimizer.items() for name in each}),
        "mu": [float(layer.mu) for _, layer in latent_layers(trainer.model)],
        "logs": logs,
    }


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


class AtStep(TrainerCallback):
    """Does something when a step begins."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once `step` steps are done."""
        if state.global_step == self.step:
            self.action()


class Began(TrainerCallback):
    """Remembers after how many steps a training began, or resumed."""

    step = -1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The number of steps."""
        self.step = state.global_step


def kill() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, trainer: ProxConnectTrainer, action: Callable[..., None]) -> None:
    """Have `action` done before a function is called, in the save of the step of the fault."""
    function = getattr(owner, name)

    def first(*arguments: Any, **keywords: Any) -> Any:
        if trainer.state.global_step == FAULT_STEP:
            action(*arguments)
        return function(*arguments, **keywords)

    setattr(owner, name, first)


# What happens inside the process: functions of the trainer and its output folder.


def killed_at_a_step(trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` as a step begins."""
    trainer.add_callback(AtStep(FAULT_STEP + 1, kill))


def killed_in_the_weights(trainer: ProxConnectTrainer, folder: Path) -> None:
    """The kernel kills the process when the file of the weights has reached half its size (SIGXFSZ)."""

    def limit(*arguments: Any) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        size = (folder / f"checkpoint-{EVERY}" / "model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size))

    before(trainer, "save_model", trainer, limit)


def killed_after_the_weights(trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` when the weights are written, and nothing else."""
    before(trainer, "_save_optimizer_and_scheduler", trainer, lambda *_: kill())


def killed_before_the_manifest(trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` when all files are written but the manifest."""
    before(checkpoints, "write_manifest", trainer, lambda *_: kill())


def killed_before_the_rename(trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` when all files are written, and not renamed."""
    before(checkpoints, "put", trainer, lambda *_: kill())


def killed_in_the_rotation(trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` when the new checkpoint is there, and an old one about to be deleted."""
    before(saving, "rotate", trainer, lambda *_: kill())


def killed_at_an_operation(number: int, trainer: ProxConnectTrainer, folder: Path) -> None:
    """`kill -9` at the n-th file operation of Python in a save; with fewer of them nothing happens."""

    def watched(*_: Any) -> None:
        kill_at_an_operation(number, folder)

    before(trainer, "_save_checkpoint", trainer, watched)
    before(trainer.callback_handler, "on_save", trainer, lambda *_: kill_at_an_operation(0, folder))


left = {}


def kill_at_an_operation(number: int, folder: Path) -> None:
    """`kill -9` at the n-th operation from here on that names a folder, or something in it; 0: at none."""
    if not left:
        sys.addaudithook(_watch)
    left[str(folder)] = number


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in OPERATIONS:
        for folder in left:
            if folder in str(arguments):
                left[folder] -= 1
                if left[folder] == 0:
                    kill()


def sigterm_at_a_step(trainer: ProxConnectTrainer, folder: Path) -> None:
    """SIGTERM in the middle of step 4, of which no checkpoint is due."""
    trainer.add_callback(AtStep(FAULT_STEP, lambda: os.kill(os.getpid(), signal.SIGTERM)))


def full_disk(trainer: ProxConnectTrainer, folder: Path) -> None:
    """The file of the optimizer lies on a device that is full (/dev/full)."""

    def link(output_dir: str) -> None:
        (Path(output_dir) / "optimizer.pt").symlink_to("/dev/full")

    before(trainer, "_save_optimizer_and_scheduler", trainer, link)


def nan_loss(trainer: ProxConnectTrainer, folder: Path) -> None:
    """The loss is NaN at step 4, in this process."""
    compute = trainer.compute_loss

    def broken(*arguments: Any, **keywords: Any) -> Any:
        loss = compute(*arguments, **keywords)
        return loss * float("nan") if trainer.state.global_step == FAULT_STEP - 1 else loss

    trainer.compute_loss = broken  # type: ignore[method-assign]


def begin_when_told(ready: Any, told: Any, trainer: ProxConnectTrainer, folder: Path) -> None:
    """Say that everything is ready to train, and wait to be told to."""
    ready.wait(HANGS)
    told.wait(HANGS)


def write_a_release(folder: Path, seed: int, number: int = 0) -> None:
    """A packed model, the weights by the seed; with `kill -9` at the n-th file operation."""
    torch.manual_seed(seed)
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(make_config())))
    kill_at_an_operation(number, folder.parent)
    write_release(model, folder)


def race_to_a_release(folder: Path, seed: int, barrier: Any, said: Path) -> None:
    """Write a release at the moment at which another process does."""
    _say_into(said)
    torch.manual_seed(seed)
    model = proxbit.pack(proxbit.binarize(ViTForImageClassification(make_config())))
    barrier.wait(HANGS)
    write_release(model, folder)


@dataclass(frozen=True)
class Job:
    """A training in a process.

    Attributes:
        folder: output folder.
        inject: what happens to it, and to which rank; None: to all.
        resume: as `train` takes it.
        ranks: how many processes train together.
        changes: of the arguments.
    """

    folder: Path
    inject: Callable[..., None] | None = None
    rank: int | None = None
    resume: bool | str | None = None
    ranks: int = 1
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        status: its exit status; minus the number of a signal; None: it had to be killed, for it did not end.
        said: its standard error.
    """

    status: int | None
    said: str

    @property
    def last_line(self) -> str:
        """What it said last."""
        return next((line.strip() for line in reversed(self.said.splitlines()) if line.strip()), "")


def run(job: Job) -> list[Ended]:
    """Run a training to whatever end; one result a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return wait([start(job, f"rank{rank}", rank, port) for rank in range(job.ranks)])


@dataclass(frozen=True)
class Started:
    """A process, and the file that it says everything to."""

    process: BaseProcess
    said: Path


def start(job: Job, name: str, rank: int = 0, port: int = 0) -> Started:
    """Start one process of a training, which says everything to a file of this name."""
    said = job.folder.with_name(f"{job.folder.name}.{name}.txt")
    process = CONTEXT.Process(target=_train, args=(job, rank, port, said))
    process.start()
    return Started(process, said)


def wait(started: list[Started]) -> list[Ended]:
    """Wait for processes to end, and kill those that do not."""
    ended = []
    for each in started:
        each.process.join(HANGS)
        status = each.process.exitcode
        if status is None:
            each.process.kill()
            each.process.join()
        ended.append(Ended(status, each.said.read_text() if each.said.exists() else ""))
    return ended


@dataclass(frozen=True)
class Result:
    """Of a training that came to its end.

    Attributes:
        began: after how many steps it began, or resumed.
        outcome: see `outcome`.
    """

    began: int
    outcome: dict[str, Any]


def result(folder: Path) -> Result:
    """Of the last training in a folder."""
    return Result(**json.loads(folder.with_name(f"{folder.name}.json").read_text()))


def _say_into(said: Path) -> None:
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _train(job: Job, rank: int, port: int, said: Path) -> None:
    _say_into(said)
    if job.ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.ranks)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(job.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    trainer = make_trainer(job.folder, **job.changes | ({"ddp_backend": "gloo"} if job.ranks > 1 else {}))
    if job.inject is not None and job.rank in (None, rank):
        job.inject(trainer, job.folder)
    began = Began()
    trainer.add_callback(began)
    trainer.train(resume_from_checkpoint=job.resume)
    if rank == 0:
        text = json.dumps({"began": began.step, "outcome": outcome(trainer)})
        job.folder.with_name(f"{job.folder.name}.json").write_text(text)
    if job.ranks > 1:
        torch.distributed.destroy_process_group()
