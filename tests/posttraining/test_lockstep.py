"""Forward passes in lockstep: who meets where, what goes on, and what ends."""

import threading
import time

import pytest
import torch
from torch import nn

from proxbit.posttraining.lockstep import Pass, lockstep, one_thread, summed

CPU = torch.device("cpu")


class Twice(nn.Module):
    """A layer that is called twice, and one that is called for some inputs only."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.rare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.again(self.again(self.first(x)))
        return self.rare(x) if len(x) > 2 else x


def passes(model, sizes, results):
    def run(k, size):
        results[k] = model(torch.full((size, 4), float(k)))

    return [Pass(lambda k=k, size=size: run(k, size), k) for k, size in enumerate(sizes)]


def go(model, sizes, workers=2, change=None):
    sites = {name: module for name, module in model.named_modules() if name}
    results, seen = {}, []
    for meeting in lockstep(sites, passes(model, sizes, results), workers=workers, device=CPU):
        seen.append((meeting.name, [each.key for each in meeting.passes]))
        if change is not None:
            change(meeting)
    return seen, results


@pytest.mark.parametrize("workers", [1, 3])
def test_all_meet_at_every_module_in_order(workers):
    model = Twice().eval()
    seen, results = go(model, [1, 3, 2, 3], workers)
    assert seen == [("first", [0, 1, 2, 3]), ("again", [0, 1, 2, 3]), ("again", [0, 1, 2, 3]), ("rare", [1, 3])]
    for k, size in enumerate([1, 3, 2, 3]):
        assert torch.equal(results[k], model(torch.full((size, 4), float(k))))
    assert "forward" not in vars(model.first)


def test_what_is_changed_at_a_meeting_is_seen_by_all_who_waited():
    model = Twice().eval()

    def change(meeting):
        with torch.no_grad():
            meeting.module.weight.zero_()
            meeting.module.bias.fill_(1.0)
        meeting.passes[0].output = torch.full((1, 4), 7.0)

    _, results = go(model, [1, 1], change=change)
    assert results[0].unique().tolist() == [7.0] and results[1].unique().tolist() == [1.0]


def test_only_so_many_run_at_a_time():
    running, most, lock = 0, 0, threading.Lock()

    class Slow(nn.Module):
        def forward(self, x):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1
            return x

    for workers in (1, 2):
        running, most = 0, 0
        assert (
            list(lockstep({}, [Pass(lambda: Slow()(torch.ones(1)), k) for k in range(6)], workers=workers, device=CPU))
            == []
        )
        assert most == workers


def test_an_error_of_one_ends_all():
    model = Twice().eval()

    def broken(module, arguments):
        if float(arguments[0][0, 0]) == 1:
            raise RuntimeError("broken")

    model.first.register_forward_pre_hook(broken)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="^broken$"):
        go(model, [1, 1, 1])
    assert threading.active_count() == before and "forward" not in vars(model.first)


def test_who_stops_asking_ends_all():
    model, before = Twice().eval(), threading.active_count()
    walk = lockstep({"first": model.first}, passes(model, [1, 1], {}), workers=1, device=CPU)
    assert next(walk).name == "first"
    assert threading.active_count() == before + 2
    walk.close()
    assert threading.active_count() == before and "forward" not in vars(model.first)


def test_autocast_of_the_caller_holds():
    kinds = []
    layer = nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        list(lockstep({}, [Pass(lambda: kinds.append(layer(torch.ones(1, 4))), 0)], workers=1, device=CPU))
    assert kinds[0].dtype == torch.bfloat16 and not kinds[0].requires_grad


def test_sums_are_the_same_for_any_number_of_workers():
    parts = [torch.randn(100) for _ in range(7)]
    found = [summed(lambda part: [part.sum(), part], parts, workers) for workers in (1, 2, 5)]
    assert all(torch.equal(a, b) for each in found[1:] for a, b in zip(found[0], each, strict=True))
    torch.testing.assert_close(found[0][0], torch.stack(parts).double().sum(), rtol=1e-6, atol=1e-6)


def test_one_thread_for_a_while():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), one_thread() as workers:
        assert (workers, torch.get_num_threads()) == (before, 1)
        raise KeyError
    assert torch.get_num_threads() == before
