"""Lists that are made once, and buffers that are looked at once."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_linear_attn.ops.base import memo
from hf_linear_attn.ops.base.memo import kept_lists, known_number, known_zero, note_number

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


def test_a_buffer_is_looked_at_when_it_is_new_or_changed_in_place():
    buffer = torch.zeros(2, 3)
    assert known_zero(buffer)
    buffer[1, 2] = 1
    assert not known_zero(buffer)
    buffer.zero_()
    assert known_zero(buffer)
    buffer.data = torch.ones(2, 3)
    assert not known_zero(buffer)
    assert known_zero(torch.zeros(0))


def test_a_buffer_that_is_saved_says_nothing_of_the_look():
    buffer = torch.zeros(2)
    known_zero(buffer)
    assert vars(buffer) == {}


def test_nobody_looks_where_values_are_not_known():
    def look(x):
        return x + 1 if known_zero(x) else x + 2

    zeros = torch.zeros(2)
    assert torch.equal(look(zeros), zeros + 1)
    assert torch.equal(torch.compile(look, backend="eager", fullgraph=True)(zeros), zeros + 2)
    assert torch.equal(torch.vmap(look)(zeros), zeros + 2)
    assert not known_zero(torch.zeros(2, device="meta"))
    with FakeTensorMode():
        assert not known_zero(torch.zeros(2))
    with torch.inference_mode():
        assert not known_zero(torch.zeros(2))


def test_a_number_is_known_of_the_tensor_that_was_noted_until_it_changes():
    x = note_number(torch.full((3,), 7), 7)
    assert known_number(x) == 7
    assert known_number(x.clone()) is None
    assert known_number(x[[2, 0, 1]]) is None
    x.add_(1)
    assert known_number(x) is None
    x = note_number(torch.full((3,), 7), 7)
    x.data[1] = 3
    assert known_number(x) is None


def test_no_number_is_noted_where_it_would_be_read_for_other_inputs(monkeypatch):
    with torch.inference_mode():  # writes are not counted there
        assert known_number(note_number(torch.zeros(2), 0)) is None
    x = note_number(torch.zeros(2), 0)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert known_number(x) is None
