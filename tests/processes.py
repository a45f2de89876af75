"""Processes on the CPU, joined by gloo, that are started once and run what tests hand them.

They are forked from a server that has imported everything once.
"""

import faulthandler
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

CONTEXT = get_context("forkserver")
# By names of packages: the server does not know the folder of this file.
CONTEXT.set_forkserver_preload(["proxbit.training", "transformers.models.vit.modeling_vit"])


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What `torchrun` and `accelerate launch` give a process."""
    sizes = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | {name: str(n) for name, n in sizes.items()}


def _work(rank: int, world: int, port: int, patience: int, calls: Connection) -> None:
    os.environ |= _environment(rank, world, port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        torch.manual_seed(0)
        try:
            # A function of a module that cannot be imported here is an answer too.
            function, args, kwargs = calls.recv()
            faulthandler.dump_traceback_later(patience - 10)
            answer = (True, function(*args, **kwargs))
        except BaseException:
            answer = (False, traceback.format_exc())
        faulthandler.cancel_dump_traceback_later()
        calls.send(answer)


class Processes:
    """Calls functions of importable modules in all processes, at the same time.

    Args:
        world: how many.
        patience: seconds until a call that does not come back is taken for processes that wait for each other.
    """

    def __init__(self, world: int = 2, patience: int = 300) -> None:
        self.patience = patience
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [CONTEXT.Pipe() for _ in range(world)]
        self.calls = [mine for mine, _ in pipes]
        self.processes = [
            CONTEXT.Process(target=_work, args=(rank, world, port, patience, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What the function returns in each process, by rank."""
        for call in self.calls:
            call.send((function, args, kwargs))
        answers = []
        for rank, call in enumerate(self.calls):
            if not call.poll(self.patience):
                answers.append((False, f"The process of rank {rank} did not come back."))
            else:
                answers.append(call.recv())
        failures = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        if failures:
            # One may wait for the other for ever.
            self.end()
            self.__init__(len(self.calls), self.patience)
            raise AssertionError("\n".join(failures))
        return [answer for _, answer in answers]

    def end(self) -> None:
        """End all."""
        for process in self.processes:
            process.kill()
            process.join()
