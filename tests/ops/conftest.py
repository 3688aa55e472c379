import pytest

from hf_linear_attn.ops.linear import layout


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 tokens in chunks of 8."""
    monkeypatch.setattr(layout, "_CPU_BLOCK_ROWS", 1)
    monkeypatch.setattr(layout, "_MIN_BLOCK", 16)
    monkeypatch.setattr(layout, "CHUNK", 8)
