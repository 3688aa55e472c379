"""Lists that are made once."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_linear_attn.ops.base import memo
from hf_linear_attn.ops.base.memo import kept_lists

CPU = torch.device("cpu")


def counted(monkeypatch):
    monkeypatch.setattr(memo, "_kept", type(memo._kept)())
    made = []

    def build():
        made.append(torch.arange(3))
        return made[-1]

    return made, build


def test_a_list_is_made_once_per_key(monkeypatch):
    made, build = counted(monkeypatch)
    assert kept_lists(("a", 1), CPU, build) is kept_lists(("a", 1), CPU, build)
    kept_lists(("a", 2), CPU, build)
    assert len(made) == 2


def test_the_least_recently_used_goes_first(monkeypatch):
    made, build = counted(monkeypatch)
    monkeypatch.setattr(memo, "_KEPT_LISTS", 2)
    for key in ("a", "b", "a", "c", "a", "b"):  # c pushes b out, not a
        kept_lists((key,), CPU, build)
    assert len(made) == 4


def test_what_inference_mode_makes_can_be_trained_with(monkeypatch):
    _, build = counted(monkeypatch)
    with torch.inference_mode():
        assert not kept_lists(("a",), CPU, build).is_inference()


def test_nothing_fake_or_traced_is_kept(monkeypatch):
    made, build = counted(monkeypatch)
    with FakeTensorMode():
        kept_lists(("a",), CPU, build)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    kept_lists(("a",), CPU, build)
    monkeypatch.undo()
    assert len(made) == 2


class Stream:
    """A stream of a GPU, of which it is noted what waits for what."""

    def __init__(self, name, waits):
        self.name, self.waits = name, waits

    def record_event(self):
        return f"event of {self.name}"

    def wait_event(self, event):
        self.waits.append((self.name, event))


def test_another_stream_waits_for_the_lists_and_the_cpu_does_not(monkeypatch):
    made, build = counted(monkeypatch)
    waits = []
    first, second = Stream("first", waits), Stream("second", waits)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for stream in (first, first, second, second):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        kept_lists(("a",), torch.device("cuda"), build)
    assert len(made) == 1
    assert waits == [("second", "event of first")] * 2
