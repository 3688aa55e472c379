"""Shared fixtures: one thread per worker, no network beyond loopback."""

from __future__ import annotations

import gc
import itertools
import logging
import socket
from collections.abc import Iterator

import pytest
import torch

from hf_linear_attn.ops.features.named import registered_names, unregister_feature_map
from hf_linear_attn.registry import VARIANTS, list_variants, register_variant
from hf_linear_attn.variants.base import AttentionVariant, VariantConfig

_TESTS = itertools.count()
_LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _short_collections() -> None:
    """What imports and earlier tests made stays: `gc.collect()`, a second with it, need not look at it again.

    Compiled graphs are millions of objects, and a Trainer collects several times a run.
    """
    if next(_TESTS) % 50 == 0:
        gc.collect()
        gc.freeze()


class _DeprecationsAreErrors(logging.Handler):
    """Transformers announces some of them in its log alone."""

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        upstreams_own = said.startswith("Passing `generation_config` together")  # assisted generation does
        if "deprecated" in said and not upstreams_own:
            raise AssertionError(f"Transformers says: {record.getMessage()}")


@pytest.fixture(autouse=True, scope="session")
def _no_deprecated_calls() -> Iterator[None]:
    handler = _DeprecationsAreErrors()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_feature_map_stays() -> Iterator[None]:
    """A name registered in one test, by the documents' examples among others, is unknown in the next."""
    before = registered_names()
    yield
    for name in set(registered_names()) - set(before):
        unregister_feature_map(name)


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Fail a test that opens a connection beyond this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and str(address[0]) not in _LOOPBACK:
            raise AssertionError(f"{request.node.name} tried to connect to {address[0]}")
        return connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def past_only() -> Iterator[str]:
    """The key of a method that serves decoders only, which none of the package does."""
    list_variants()  # all are registered before

    @register_variant(
        "past_only",
        config=VariantConfig,
        title="Past only",
        paper="none",
        cost="n d",
        state="kv",
        encoder=False,
        refusal="past_only looks back; use 'linear' on encoders.",
    )
    class PastOnly(AttentionVariant):
        pass

    yield PastOnly.spec.key
    VARIANTS.unregister("past_only")
