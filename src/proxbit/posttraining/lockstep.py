"""Many forward passes of one model in lockstep: each in a thread of its own, they stop together at chosen modules.

Whoever walks along sees what every pass brings to a module before any of them goes on. So a model can be changed layer
by layer, in the order in which it computes, whatever its forward does between its layers: one forward pass in all.
"""

import contextvars
import ctypes
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Meeting", "Pass", "current_pass", "lockstep", "one_thread", "summed"]

Part = TypeVar("Part")
_current: contextvars.ContextVar["Pass | None"] = contextvars.ContextVar("proxbit_pass", default=None)


class _Cancelled(BaseException):
    """Ends a pass whose walk is over."""


class Pass:
    """One forward pass, in a thread of its own.

    Args:
        run: what it does.
        key: what whoever walks along knows it by.

    Attributes:
        name: of the module that it waits at; None while it runs, and when it is done.
        input: what the module was called with.
        output: what it returns when it goes on; None for what the module itself makes of its input.
        kept: whatever hooks keep of it, by name.
    """

    def __init__(self, run: Callable[[], Any], key: Any) -> None:
        self.run, self.key = run, key
        self.name: str | None = None
        self.input: Tensor | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.done = self.cancelled = False
        self.kept: dict[str, Tensor] = {}
        self._go = threading.Semaphore(0)
        self._room: _Room | None = None

    def start(self, room: "_Room") -> threading.Thread:
        """A thread that runs the pass, in the context of the caller."""
        self._room = room
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        assert self._room is not None
        _current.set(self)
        try:
            self._wait()
            with self._room.thread_state():
                self.run()
        except _Cancelled:
            pass
        except BaseException as error:  # It is raised again where the walk is.
            self.error = error
        self.done = True
        self._room.leave()

    def _wait(self) -> None:
        self._go.acquire()
        if self.cancelled:
            raise _Cancelled
        assert self._room is not None
        self._room.turn.acquire()

    def go(self) -> None:
        """Let it go on, as soon as it is its turn."""
        self.name = None
        self._go.release()

    def cancel(self) -> None:
        """End it where it waits."""
        self.cancelled = True
        self._go.release()

    def stop(self, name: str, input: Tensor, forward: Callable[[], Any]) -> Any:
        """Wait at a module; then return what it is to return."""
        assert self._room is not None
        self.name, self.input = name, input
        self._room.leave()
        self._wait()
        output, self.output, self.input = self.output, None, None
        return forward() if output is None else output


def current_pass() -> Pass | None:
    """The pass that the caller is part of."""
    return _current.get()


class _Room:
    """Counts the passes that run, and lets so many of them run at a time."""

    def __init__(self, workers: int, device: torch.device) -> None:
        self.turn = threading.Semaphore(workers)
        self.device = device
        self._autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        self._running = 0
        self._changed = threading.Condition()

    @contextmanager
    def thread_state(self) -> Iterator[None]:
        """What torch keeps for each thread by itself, as in the thread that walks."""
        enabled, dtype = self._autocast
        with ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast(self.device.type, dtype, enabled=enabled))
            yield

    def enter(self, count: int) -> None:
        with self._changed:
            self._running += count

    def leave(self) -> None:
        self.turn.release()
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        """Until all passes wait, or are done."""
        with self._changed:
            self._changed.wait_for(lambda: self._running == 0)


@dataclass(frozen=True)
class Meeting:
    """Passes that wait at one module.

    Attributes:
        name: of the module.
        module: itself.
        passes: in the order in which they were given.
    """

    name: str
    module: nn.Module
    passes: Sequence[Pass]


def _give_back_memory() -> None:
    """Let glibc return what was freed: it keeps that for each thread by itself, and here are many."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _stopping(modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Within the context, passes stop where these modules are called; other callers do not notice."""
    before = {name: vars(module).get("forward") for name, module in modules.items()}

    def stopping(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            current = _current.get()
            if current is None:
                return forward(*args, **kwargs)
            given = args[0] if args else next(iter(kwargs.values()))
            return current.stop(name, given, lambda: forward(*args, **kwargs))

        return call

    for name, module in modules.items():
        vars(module)["forward"] = stopping(name, module.forward)
    try:
        yield
    finally:
        for name, module in modules.items():
            del vars(module)["forward"]
            if before[name] is not None:
                vars(module)["forward"] = before[name]


def lockstep(
    modules: Mapping[str, nn.Module], passes: Sequence[Pass], *, workers: int, device: torch.device
) -> Iterator[Meeting]:
    """Run passes from one module to the next; between two of them, whatever is done with the meeting is done.

    Args:
        modules: at which passes stop, by name. Passes whose forwards part ways meet in smaller groups.
        passes: of models that hold these modules.
        workers: how many run at a time.
        device: of the model.

    Yields:
        The passes that wait at one module. All go on when the next meeting is asked for.

    Raises:
        Exception: what a pass raises; the other passes are ended then, as they are when nobody asks any more.
    """
    room = _Room(workers, device)
    with _stopping(modules):
        threads = [each.start(room) for each in passes]
        try:
            ready: Sequence[Pass] = passes
            while ready:
                _give_back_memory()
                room.enter(len(ready))
                for each in ready:
                    each.go()
                room.wait()
                for each in passes:
                    if each.error is not None:
                        raise each.error
                waiting = [each for each in passes if not each.done]
                ready = [each for each in waiting if each.name == waiting[0].name]
                if ready:
                    assert ready[0].name is not None
                    yield Meeting(ready[0].name, modules[ready[0].name], ready)
        finally:
            for each in passes:
                each.cancel()
            for thread in threads:
                thread.join()


@contextmanager
def one_thread() -> Iterator[int]:
    """Within the context, operators of torch use one thread, so that results are the same on any number of cores; gives
    how many threads there were, for so many things to be done at a time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield before
    finally:
        torch.set_num_threads(before)


def summed(function: Callable[[Part], Sequence[Tensor]], parts: Iterable[Part], workers: int) -> list[Tensor]:
    """The sums, in fp64, of what a function gives for each part, always in the same order.

    Args:
        function: gives tensors of the same shapes for every part.
        parts: at least one.
        workers: how many are made at a time.
    """
    parts = list(parts)
    total: list[Tensor] = []
    made = torch.no_grad()(function)  # a thread of a pool has its own mode
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(parts), workers):
            for found in pool.map(made, parts[start : start + workers]):
                if total:
                    for whole, part in zip(total, found, strict=True):
                        whole += part
                else:
                    total = [part.double().clone() for part in found]
    return total
