"""The laws of the contract; each docstring is the promise."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import json
import weakref
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hf_linear_attn.testing.contract import Subject, law
from hf_linear_attn.testing.tools import (
    AllocationRecorder,
    assert_close,
    cast,
    dense_softmax,
    draw,
    each,
    floats,
    merged,
    padding_masks,
    poisoned,
    scaled,
    select,
    snapshot,
    tokens,
    value_error,
)
from hf_linear_attn.variants.base import AttentionInputs, AttentionVariant

LENGTHS = (1, 7, 36, 65, 130)


@law(lambda subject: not subject.served)
def refusal(subject: Subject) -> None:
    """A side that is not served is refused with the reason that the registry states."""
    assert subject.spec.refusal, "the spec gives no reason"
    message = value_error(subject.build)
    assert message, "the layer was built"
    assert subject.spec.refusal in message, f"refused with another reason: {message}"


def _last_queries(module: AttentionVariant, inputs: AttentionInputs) -> torch.Tensor | None:
    """Output for fewer queries than keys; None where a variant that projects the keys' hidden states refuses.

    Such a call holds the hidden states of its queries only. The refusal has to say so, and a variant
    that also runs without any hidden states has no reason for it.
    """
    try:
        return module(inputs)[0]
    except ValueError as error:
        if "hidden states" not in str(error):
            raise
        whole = draw(module.context, inputs.key.shape[2], dtype=inputs.query.dtype)
        try:
            module(dataclasses.replace(whole, hidden_states=None))
        except ValueError:
            return None
        raise error from None


@law()
def shapes_and_dtypes(subject: Subject) -> None:
    """Output `[B, H, Tq, D]`, finite, in the query's dtype, at any length, with fewer queries than keys."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        module = subject.build(dtype=dtype)
        for length in LENGTHS:
            for queries in {length, max(1, length // 3)}:
                inputs = draw(module.context, length, queries=queries, dtype=dtype)
                output = module(inputs)[0] if queries == length else _last_queries(module, inputs)
                what = f"T={length} Tq={queries} {dtype}"
                if output is not None:
                    assert output.shape == inputs.query.shape, f"{what}: shape {tuple(output.shape)}"
                    assert output.dtype == dtype, f"{what}: output is {output.dtype}"
                    assert output.isfinite().all(), f"{what}: not finite"
        assert module(draw(module.context, 7, dtype=dtype))[1] is None, "a state came back though none was given"


@law(lambda subject: subject.served and subject.is_causal)
def right_alignment(subject: Subject) -> None:
    """Fewer queries than keys are the last ones."""
    module = subject.build(trained=True)
    for side, mask in {"none": None, **padding_masks(2, 65)}.items():
        full = module(draw(module.context, 65, padding=mask))[0]
        real = torch.ones(2, 65, dtype=torch.bool) if mask is None else mask
        for queries in (1, 30, 60):
            output = _last_queries(module, draw(module.context, 65, queries=queries, padding=mask))
            if output is not None:
                seen = real[:, -queries:]
                expected = full[:, :, -queries:].transpose(1, 2)[seen]
                assert_close(output.transpose(1, 2)[seen], expected, f"Tq={queries} of 65, padding={side}")


@law(lambda subject: subject.served and subject.is_causal)
def causality(subject: Subject) -> None:
    """No row changes when a later token does, huge or global ones included; its own row does."""
    for trained in (False, True):
        module = subject.build(trained=trained)
        for with_global in subject.global_choices:
            inputs = draw(module.context, 65, with_global=with_global)
            other = draw(module.context, 65, seed=1, with_global=with_global)
            before = module(inputs)[0]
            for token in (1, 20, 33, 64):
                later = torch.arange(65) >= token
                for factor in (1.0, 100.0):
                    changed = merged(inputs, scaled(other, factor), later)
                    after = module(changed)[0]
                    what = f"tokens from {token} on changed (factor {factor:g}, trained={trained})"
                    assert_close(after[:, :, :token], before[:, :, :token], what)
                    assert not torch.equal(after[:, :, token], before[:, :, token]), f"{what}: own row kept"


@law(lambda subject: subject.decodes)
def decode(subject: Subject) -> None:
    """Token by token or in any chunks gives the full forward, wherever the padding; states stay unchanged."""
    splits = ((1,) * 70, (70,), (33, 1, 1, 1, 34), (1, 40, 29), (7,) * 10)
    for trained in (False, True):
        module = subject.build(trained=trained)
        for side, padding in {"none": None, **padding_masks(2, 70)}.items():
            inputs = draw(module.context, 70, padding=padding)
            real = torch.ones(2, 70, dtype=torch.bool) if padding is None else padding
            full = module(inputs)[0]
            for split in splits if trained else splits[:1]:
                state = module.init_state(2, inputs.query.dtype, inputs.query.device)
                outputs = []
                for chunk in torch.arange(70).split(list(split)):
                    kept = {name: x.clone() for name, x in state.items()}
                    given = state
                    output, state = module(tokens(inputs, chunk), state)
                    assert state is not None, "a state was given and none came back"
                    assert all(torch.equal(given[name], kept[name]) for name in kept), "changed the state in place"
                    outputs.append(output)
                decoded = torch.cat(outputs, 2)
                what = f"padding={side} chunks={split[:5]} trained={trained}"
                assert decoded.isfinite().all(), f"{what}: not finite"
                assert_close(decoded.transpose(1, 2)[real], full.transpose(1, 2)[real], what)


@law(lambda subject: subject.decodes)
def state_is_batch_first(subject: Subject) -> None:
    """Selecting rows of every state tensor is selecting rows of the batch: what beam search does."""
    module = subject.build(trained=True)
    inputs = draw(module.context, 40, batch=3, padding=padding_masks(3, 40)["left"])
    state = module.init_state(3, inputs.query.dtype, inputs.query.device)
    for name, x in state.items():
        assert x.shape[:1] == (3,), f"state {name!r} has shape {tuple(x.shape)} for a batch of 3"
    _, state = module(tokens(inputs, torch.arange(30)), state)
    assert state is not None
    order = torch.tensor([2, 0, 0, 1])
    rest = tokens(inputs, torch.arange(30, 40))
    expected = module(rest, state)[0][order]
    selected = {name: x.index_select(0, order) for name, x in state.items()}
    assert_close(module(select(rest, order), selected)[0], expected, "rows 2, 0, 0, 1")


@law(lambda subject: subject.decodes)
def state_memory(subject: Subject) -> None:
    """A state keeps its own tensors alive and nothing else, and nobody keeps them: none of them is a small view of a
    whole sequence's, and they are freed with the state.
    """
    module = subject.build(trained=True)
    for side, padding in {"none": None, **padding_masks(2, 70)}.items():
        inputs = draw(module.context, 70, padding=padding)
        with torch.no_grad():  # a backward pass may keep what it reads
            state = module(inputs, module.init_state(2, inputs.query.dtype, inputs.query.device))[1]
        assert state is not None, "a state was given and none came back"
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in state.values()}
        used = sum(x.nbytes for x in state.values())
        assert sum(held.values()) <= used, f"padding={side}: {used} bytes of state hold {sum(held.values())} bytes"
        owned = {name: weakref.ref(x) for name, x in state.items()}
        del inputs, state
        if any(x() is not None for x in owned.values()):  # in a cycle, say
            gc.collect()
        kept = [name for name, x in owned.items() if x() is not None]
        assert not kept, f"padding={side}: kept after the state is gone: {', '.join(kept)}"


@law()
def padding(subject: Subject) -> None:
    """Left, right and interior padding poisoned with 1e9 gives the unpadded outputs on real tokens."""
    for trained in (False, True):
        module = subject.build(trained=trained)
        for with_global in subject.global_choices:
            for side, mask in padding_masks(3, 50).items():
                inputs = draw(module.context, 50, batch=3, padding=mask, with_global=with_global)
                output = module(poisoned(inputs))[0]
                what = f"{side} padding, global mask {with_global}, trained={trained}"
                assert output.isfinite().all(), f"{what}: not finite"
                for row in range(3):
                    alone = tokens(select(inputs, slice(row, row + 1)), mask[row].nonzero()[:, 0])
                    for name, bare in {
                        "an all-true": alone,
                        "no": dataclasses.replace(alone, token_mask=None),
                    }.items():
                        assert_close(
                            output[row : row + 1][:, :, mask[row]],
                            module(bare)[0],
                            f"{what}, against {name} mask",
                        )


@law()
def fully_masked_rows(subject: Subject) -> None:
    """Rows that see no key are 0, gradients are finite, and the other rows of the batch do not notice."""
    module = subject.build(trained=True)
    mask = torch.ones(2, 36, dtype=torch.bool)
    mask[0] = False
    mask[1, :9] = False
    inputs = draw(module.context, 36, padding=mask)
    inputs = floats(inputs, lambda x: x.requires_grad_())
    output = module(inputs)[0]
    assert output.isfinite().all(), "not finite"
    assert (output[0] == 0).all(), "a sequence of padding alone is not 0"
    if subject.is_causal:
        assert (output[1, :, :9] == 0).all(), "rows before the first real token are not 0"
    alone = module(select(inputs, slice(1, None)))[0]
    assert_close(output[1:, :, 9:], alone[:, :, 9:], "the row beside a fully masked one")
    output.square().sum().backward()
    for name, x in {
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        **dict(module.named_parameters()),
    }.items():
        assert x.grad is None or x.grad.isfinite().all(), f"gradient of {name} is not finite"


@law()
def batch_invariance(subject: Subject) -> None:
    """What a row gives does not depend on its batch-mates: their values, norms, lengths or number."""
    module = subject.build(trained=True)
    for with_global in subject.global_choices:
        inputs = draw(module.context, 65, batch=3, padding=padding_masks(3, 65)["right"], with_global=with_global)
        loud = torch.tensor([1.0, 1.0, 30.0], dtype=torch.float64)
        inputs = scaled(inputs, loud)
        output = module(inputs)[0]
        for row in range(3):
            alone = module(select(inputs, slice(row, row + 1)))[0]
            assert_close(output[row : row + 1], alone, f"row {row} of 3, global mask {with_global}")
        order = torch.tensor([2, 0, 1])
        assert_close(module(select(inputs, order))[0], output[order], "a permuted batch")


def _heads_are_alike(subject: Subject) -> bool:
    if not subject.served:
        return False
    config = subject.spec.config_class.from_dict(subject.options)  # type: ignore[attr-defined]
    per_head = any(isinstance(value, list | tuple) for value in config.to_dict().values())
    return not per_head and not subject.build().state_dict()


@law(_heads_are_alike)
def head_permutation(subject: Subject) -> None:
    """Without parameters or options of their own, heads may be permuted."""
    module = subject.build()
    inputs = draw(module.context, 65, padding=padding_masks(2, 65)["left"])
    order = torch.tensor([2, 0, 3, 1])
    permuted = each(inputs, lambda x, dim: x[:, order] if x.ndim == 4 else x)
    assert_close(module(permuted)[0], module(inputs)[0][:, order], "permuted heads")


@law()
def gradients(subject: Subject) -> None:
    """Gradients of inputs and parameters match finite differences; no parameter is left without one."""
    context = subject.context(head_dim=4, max_length=16)
    module = subject.build(context, trained=True)
    for with_global in subject.global_choices:
        inputs = draw(context, 7, padding=padding_masks(2, 7)["left"], with_global=with_global)
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        start = [inputs.query, inputs.key, inputs.value, inputs.hidden_states]
        variables = [
            x.detach().clone().requires_grad_()
            for x in [*start, *(module.get_parameter(n) for n in names)]
            if x is not None
        ]

        def run(q: Any, k: Any, v: Any, hidden: Any, *weights: Any, inputs: Any = inputs, names: Any = names) -> Any:
            call = dataclasses.replace(inputs, query=q, key=k, value=v, hidden_states=hidden)
            return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (call,))[0]

        assert torch.autograd.gradcheck(run, variables, fast_mode=True, atol=1e-4), "gradcheck"
    for trained in (False, True):
        module = subject.build(trained=trained)
        inputs = draw(
            module.context,
            36,
            padding=padding_masks(2, 36)["right"],
            with_global=trained and subject.global_choices[-1],
        )
        inputs = floats(inputs, lambda x: x.requires_grad_())
        module(inputs)[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"
                assert not trained or parameter.grad.any(), f"the gradient of {name} is 0 everywhere"


@law()
def determinism(subject: Subject) -> None:
    """In eval mode the same call gives the same bits, whatever came before, and changes nothing."""
    module = subject.build(trained=True)
    inputs = draw(module.context, 36, padding=padding_masks(2, 36)["right"])
    kept_inputs, kept_module = copy.deepcopy(inputs), snapshot(module)
    rng = torch.get_rng_state()
    first = module(inputs)[0]
    for length in (130, 1):
        module(draw(module.context, length, seed=length))
    torch.manual_seed(123)
    second = module(inputs)[0]
    torch.set_rng_state(rng)
    assert torch.equal(first, second), "two equal calls gave different outputs"
    changed = [name for name, value in snapshot(module).items() if kept_module.get(name) != value]
    assert not changed, f"the forward changed the module: {', '.join(changed)}"
    for item in dataclasses.fields(AttentionInputs):
        now, then = getattr(inputs, item.name), getattr(kept_inputs, item.name)
        same = torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
        assert same, f"the forward changed inputs.{item.name} in place"


@law()
def state_dict_round_trip(subject: Subject) -> None:
    """Weights saved and loaded into a fresh module give the same bits, and the shared ones exist.

    The module has the options as they were then: calibration may have settled one.
    """
    module = subject.build(dtype=torch.float32, trained=True)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    fresh = subject.build(dtype=torch.float32, options=module.config.to_dict())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    inputs = draw(module.context, 36, padding=padding_masks(2, 36)["left"], dtype=torch.float32)
    assert torch.equal(module(inputs)[0], fresh(inputs)[0]), "outputs differ after a reload"
    missing = set(module.shared_parameters()) - {name for name, _ in module.named_parameters()}
    assert not missing, f"shared_parameters names what is not there: {sorted(missing)}"


@law()
def reset_parameters(subject: Subject) -> None:
    """Deterministic, idempotent, and enough to fill a module that was built on the meta device."""
    config = subject.spec.config_class.from_dict(subject.options)  # type: ignore[attr-defined]
    module = subject.spec.module_class(config, subject.context())
    expected = {name: x.clone() for name, x in module.state_dict().items()}
    with torch.device("meta"):
        hollow = subject.spec.module_class(config, subject.context())
    hollow.to_empty(device="cpu")
    for x in [*hollow.parameters(), *hollow.buffers()]:
        x.data.fill_(float("nan") if x.is_floating_point() else 1)
    torch.manual_seed(1)
    module.reset_parameters()
    hollow.reset_parameters()
    for what, actual in {"a second call": module, "a module from the meta device": hollow}.items():
        found = actual.state_dict()
        assert list(found) == list(expected), f"{what} has other entries"
        for name, x in expected.items():
            assert torch.equal(found[name], x), f"{what} leaves {name} different from construction"
    inputs = draw(subject.context(), 36, dtype=torch.float32)
    assert torch.equal(hollow.eval()(inputs)[0], module.eval()(inputs)[0]), "outputs differ after meta and reset"


@law(lambda subject: subject.served and subject.spec.exact_limit is not None)
def exact_limit(subject: Subject) -> None:
    """With the options of `spec.exact_limit` the output is softmax attention, padding included."""
    assert subject.spec.exact_limit is not None
    for length in LENGTHS:
        options = subject.spec.exact_limit(length, subject.is_causal)
        for max_length in (length, 160):
            module = subject.build(subject.context(max_length=max_length), dtype=torch.float32, options=options)
            for side, mask in {"none": None, **padding_masks(2, length)}.items():
                inputs = draw(module.context, length, padding=mask, dtype=torch.float32)
                real = torch.ones(2, length, dtype=torch.bool) if mask is None else mask
                output, expected = module(inputs)[0], dense_softmax(inputs)
                what = f"T={length} max_length={max_length} padding={side}"
                assert_close(output.transpose(1, 2)[real], expected.transpose(1, 2)[real], what)


@law(lambda subject: subject.served and subject.spec.claims_linear_cost(subject.options))
def linear_memory(subject: Subject) -> None:
    """No tensor has two dimensions of sequence length, and the largest one grows in proportion to it."""
    largest = {}
    for length in (2048, 4096):
        context = subject.context(head_dim=4, max_length=length)
        module = subject.build(context, dtype=torch.float32)
        inputs = draw(context, length, batch=1, dtype=torch.float32)
        with AllocationRecorder() as recorder, torch.no_grad():
            module(inputs)
        square = [shape for shape, size in recorder.seen if sum(s >= length for s in shape) > 1 and size >= length**2]
        assert not square, f"T={length}: tensors of shape {sorted(set(square))}"
        largest[length] = max(size for _, size in recorder.seen)
    assert largest[4096] <= 2.2 * largest[2048], f"the largest tensor grows from {largest[2048]} to {largest[4096]}"


@law()
def low_precision(subject: Subject) -> None:
    """bf16, fp16 and autocast (half inputs, fp32 parameters) stay close to fp32 on the same numbers."""
    module = subject.build(dtype=torch.float32, trained=True)
    for length in (36, 130):
        exact = draw(module.context, length, padding=padding_masks(2, length)["right"], dtype=torch.float32)
        for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float16, 0.01)):
            inputs = cast(exact, dtype)
            half = copy.deepcopy(module).to(dtype)
            with torch.autocast("cpu", dtype=dtype):
                mixed = module(inputs)[0]
            # The reference is fp32 on the rounded numbers: rounding them is not the variant's doing.
            rounded = cast(inputs, torch.float32)
            outputs = {
                "parameters and inputs": (half(inputs)[0], copy.deepcopy(half).float()(rounded)[0]),
                "autocast": (mixed, module(rounded)[0]),
            }
            for name, (output, expected) in outputs.items():
                what = f"{dtype} {name}, T={length}"
                assert output.dtype == dtype, f"{what}: output is {output.dtype}"
                error = ((output.float() - expected).norm() / expected.norm()).item()
                assert error < tolerance, f"{what}: relative error {error:.3f}, allowed {tolerance}"


@law()
def gradient_checkpointing(subject: Subject) -> None:
    """Recomputing the forward in the backward gives the same outputs and gradients, in train mode."""
    module = subject.build(trained=True).train()
    inputs = draw(module.context, 36, padding=padding_masks(2, 36)["left"])
    results = []
    for mode in (None, False, True):
        module.zero_grad()
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return module(dataclasses.replace(inputs, query=q, key=k, value=v))[0]

        output = run(*leaves) if mode is None else checkpoint(run, *leaves, use_reentrant=mode)
        output.square().sum().backward()
        parameters = [p.grad for p in module.parameters() if p.requires_grad]
        results.append([output, *(x.grad for x in leaves), *parameters])
    for found in results[1:]:
        for actual, expected in zip(found, results[0], strict=True):
            assert_close(actual, expected, "checkpointed")


@law()
def options_survive_json(subject: Subject) -> None:
    """Options round-trip through JSON, are frozen, and an unknown one is an error that names it."""
    config_class: Any = subject.spec.config_class
    config = config_class.from_dict(subject.options)
    assert config_class.from_dict(json.loads(json.dumps(config.to_dict()))) == config, "JSON changed the options"
    assert hash(config) == hash(copy.deepcopy(config)), "not hashable by value"
    message = value_error(lambda: config_class.from_dict({"no_such_option": 1}))
    assert message, "an unknown option was accepted"
    assert "no_such_option" in message, f"the error does not name the option: {message}"
    for item in dataclasses.fields(config):
        try:
            setattr(config, item.name, None)
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"option {item.name} can be changed after construction")
