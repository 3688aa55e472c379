"""What an op is told about the tracer that calls it."""

import pytest
import torch
from torch import nn

from hf_linear_attn.ops.base.tracing import is_exported, segments


class _Asks(nn.Module):
    def forward(self, x):
        return x + int(is_exported())


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_told_so_and_a_compiled_graph_is_not(strict):
    model, x = _Asks(), torch.zeros(3)
    exported = torch.export.export(model, (x,), strict=strict).module()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert [float(f(x)[0]) for f in (model, compiled, exported, model)] == [0, 0, 1, 0]


def test_segments_cover_every_row_once_within_the_bound():
    for count, most, each in ((10, 12, 4), (3, 100, 1), (5, 1, 7)):
        parts = segments(count, most, each)
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
        assert all((part.stop - part.start) * each <= max(most, each) for part in parts)
