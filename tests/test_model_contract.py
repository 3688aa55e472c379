"""The contract on whole models: every variant on every family it serves, read from the registries.

What takes seconds runs on fewer pairs: every variant on one encoder and one decoder, every family with two variants.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_linear_attn import convert_model, get_variant
from hf_linear_attn.registry import get_patcher
from hf_linear_attn.seam.checkpointing import enable_checkpointing
from tests.tiny import (
    FAMILIES,
    PAD,
    VOCAB,
    assert_bit_equal,
    base_model,
    is_causal,
    main_family,
    outputs_of,
    over,
    pairs,
    representative_variants,
    small_options,
    thorough_pairs,
    token_batch,
    without_dropout,
)

LENGTHS = (1, 7, 36, 65, 130)
PAIRS, THOROUGH_PAIRS = pairs(), thorough_pairs()
REPRESENTATIVE = [(variant, family) for variant, family in PAIRS if variant in representative_variants(family)]
EXACT_PAIRS = [(variant, family) for variant, family in PAIRS if get_variant(variant).exact_limit is not None]
every_pair, thorough = over(PAIRS), over(THOROUGH_PAIRS)


def long_options(variant: str, family: str) -> dict[str, Any]:
    """Options for inputs of many tokens: the defaults, and a window that is far shorter than the input."""
    return small_options(variant, family) if get_variant(variant).state == "window" else {}


LINEAR_PAIRS = [pair for pair in THOROUGH_PAIRS if get_variant(pair[0]).claims_linear_cost(long_options(*pair))]


def converted(variant: str, family: str, **overrides: Any) -> PreTrainedModel:
    return convert_model(base_model(family, **overrides), variant, **small_options(variant, family))


def hidden(model: PreTrainedModel, **batch: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


@every_pair
def test_shapes_and_no_mask_equals_full_mask(variant: str, family: str) -> None:
    model = converted(variant, family)
    for length in LENGTHS:
        batch = token_batch(length=length)
        out = hidden(model, **batch)
        assert out.shape == (2, length, 32)
        assert out.dtype == torch.float32
        torch.testing.assert_close(hidden(model, input_ids=batch["input_ids"]), out, atol=1e-5, rtol=1e-4)


def padded(real: torch.Tensor, where: str, pads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, mask, positions) of one document padded on one side or in its middle, with random ids at the pads."""
    length = real.shape[1]
    total = length + pads
    index = torch.arange(total)
    keep = {
        "right": index < length,
        "left": index >= pads,
        "interior": (index < length // 2) | (index >= length // 2 + pads),
    }[where]
    ids = torch.randint(5, VOCAB, (1, total))
    ids[0, keep] = real[0]
    positions = (keep.long().cumsum(0) - 1).clamp(min=0)
    return ids, keep[None].long(), positions[None]


@every_pair
@pytest.mark.parametrize("where", ["right", "left", "interior"])
def test_padding_equals_the_unpadded_run(variant: str, family: str, where: str) -> None:
    model = converted(variant, family)
    real = token_batch(batch=1, length=53)["input_ids"]
    offset = get_patcher(family).position_offset(model.config)
    expected = hidden(model, input_ids=real, position_ids=torch.arange(53)[None] + offset)
    for pads in (1, 40):
        ids, mask, positions = padded(real, where, pads)
        # Poison what stands at the pads: embeddings far too large.
        embeddings = model.get_input_embeddings()(ids).detach()
        embeddings[mask == 0] = 1e9
        out = hidden(model, inputs_embeds=embeddings, attention_mask=mask, position_ids=positions + offset)
        assert torch.isfinite(out).all()
        torch.testing.assert_close(out[mask.bool()], expected[0], atol=2e-4, rtol=1e-3)


@every_pair
def test_documents_do_not_depend_on_their_batch_mates(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = token_batch(batch=3, length=61)
    batch["attention_mask"][1, 30:] = 0
    batch["input_ids"][1, 30:] = PAD
    together = hidden(model, **batch)
    for row in range(3):
        alone = hidden(model, **{name: tensor[row : row + 1] for name, tensor in batch.items()})
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], alone[0][real], atol=1e-4, rtol=1e-3)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(
        hidden(model, **{name: tensor[order] for name, tensor in batch.items()}), together[order], atol=1e-4, rtol=1e-3
    )


@every_pair
def test_rows_without_a_real_token_are_finite(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = token_batch(length=20)
    batch["attention_mask"][1] = 0
    out = hidden(model, **batch)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out[:1], hidden(model, **{n: t[:1] for n, t in batch.items()}), atol=1e-5, rtol=1e-4)


@every_pair
def test_decoders_do_not_see_the_future(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = token_batch(length=65)
    out = hidden(model, **batch)
    unchanged = []
    for cut in (1, 30, 64):
        changed = batch["input_ids"].clone()
        changed[:, cut:] = (changed[:, cut:] + 7) % 80 + 5
        again = hidden(model, input_ids=changed, attention_mask=batch["attention_mask"])
        assert (again[:, cut:] - out[:, cut:]).abs().max() > 1e-3
        unchanged.append(torch.allclose(again[:, :cut], out[:, :cut], atol=1e-5, rtol=1e-5))
    # An encoder sees the future, if not from everywhere (a block that ends before the change).
    assert all(unchanged) if is_causal(family) else not all(unchanged)


def loss_and_gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**batch).last_hidden_state
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@thorough
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(variant: str, family: str, reentrant: bool) -> None:
    model = converted(variant, family, **without_dropout(family)).train()
    batch = token_batch(length=33)
    batch["attention_mask"][0, 20:] = 0
    plain = loss_and_gradients(model, batch)
    enable_checkpointing(model, use_reentrant=reentrant)
    model.enable_input_require_grads()
    again = loss_and_gradients(model, batch)
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-4 * gradient.abs().max().item() + 1e-6, rtol=1e-3)


@every_pair
def test_every_new_parameter_is_trained(variant: str, family: str) -> None:
    model = converted(variant, family).train()
    gradients = loss_and_gradients(model, token_batch(length=40))
    new = [name for name, _ in model.named_parameters() if ".linear_attn." in name]
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert [name for name in new if name not in gradients] == []


@every_pair
def test_forward_leaves_the_model_as_it_was(variant: str, family: str) -> None:
    model = converted(variant, family)
    before = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    first = hidden(model, **token_batch(length=50))
    hidden(model, **token_batch(length=9))
    assert torch.equal(hidden(model, **token_batch(length=50)), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(variant: str, family: str, dtype: torch.dtype) -> None:
    model = base_model(family)
    batch = token_batch(length=40)
    softmax = hidden(model, **batch)
    softmax_half = hidden(copy.deepcopy(model).to(dtype), **batch).float()
    convert_model(model, variant, **small_options(variant, family))
    expected = hidden(model, **batch)
    got = hidden(copy.deepcopy(model).to(dtype), **batch)
    assert got.dtype == dtype
    # The yardstick is what the same rounding does to the softmax model.
    allowed = 5 * (softmax_half - softmax).norm() / softmax.norm() + 0.01
    assert (got.float() - expected).norm() / expected.norm() < allowed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = hidden(model, **batch).float()
    assert (cast - expected).norm() / expected.norm() < allowed + 0.05


def traced(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    """`over`, where a case takes seconds: `make test` runs one variant of each family and two of the main ones."""
    main = (main_family(False), main_family(True))
    always = [(v, family) for family in FAMILIES for v in representative_variants(family)[: 1 + (family in main)]]
    marks = [() if case in always else pytest.mark.slow for case in cases]
    found = [pytest.param(*case, marks=mark, id="-".join(case)) for case, mark in zip(cases, marks, strict=True)]
    return pytest.mark.parametrize(("variant", "family"), found)


# Every layer's graph and every encoder layer's program are laws of the contract; these are about what is around them.
@traced(REPRESENTATIVE)
def test_compiles_to_one_graph(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = token_batch(length=40)
    expected = hidden(model, **batch)
    torch._dynamo.reset()
    # What a backend makes of the graph is in the contract of the variant alone.
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    extra = {"use_cache": False} if is_causal(family) else {}
    torch.testing.assert_close(hidden(compiled, **batch, **extra), expected, atol=1e-4, rtol=1e-4)


@traced([pair for pair in THOROUGH_PAIRS if pair in REPRESENTATIVE or is_causal(pair[1])])
def test_exports(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = token_batch(length=24)
    expected = hidden(model, **batch)
    kwargs = {**batch, **({"use_cache": False} if is_causal(family) else {})}
    program = torch.export.export(model, (), kwargs=kwargs, strict=False)
    with torch.no_grad():
        out = program.module()(**kwargs)
    torch.testing.assert_close(out["last_hidden_state"], expected, atol=1e-4, rtol=1e-4)


@over(EXACT_PAIRS)
def test_exact_limit_on_a_whole_model(variant: str, family: str) -> None:
    """A variant that has none is held against a dense evaluation of its own formula, in tests/variants."""
    limit: Any = get_variant(variant).exact_limit
    model = base_model(family)
    for length, padding in ((40, 0), (40, 9)):
        batch = token_batch(length=length)
        batch["attention_mask"][0, length - padding :] = 0
        twin = copy.deepcopy(model)
        expected = hidden(twin, **batch)
        # The limit is stated for the model's table: Linformer's projections are as long as that.
        convert_model(twin, variant, **limit(160, is_causal(family)))
        real = batch["attention_mask"].bool()
        torch.testing.assert_close(hidden(twin, **batch)[real], expected[real], atol=1e-5, rtol=1e-4)


@every_pair
def test_tied_and_resized_embeddings(variant: str, family: str, tmp_path: Path) -> None:
    model = converted(variant, family)
    model.resize_token_embeddings(VOCAB + 8)
    batch = token_batch()
    expected = outputs_of(model, batch)
    model.save_pretrained(tmp_path)
    assert_bit_equal(outputs_of(AutoModel.from_pretrained(tmp_path), batch), expected)


@thorough
def test_peft_lora_trains_merges_and_saves_the_variant(variant: str, family: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = converted(variant, family)
    batch = token_batch()
    expected = hidden(model, **batch)
    has_parameters = any(".linear_attn." in name for name, _ in model.named_parameters())
    query, _, value = get_patcher(family).projection_names
    projection = getattr(get_patcher(family).self_attentions(model)[0].module, query)
    config = LoraConfig(
        r=2,
        target_modules=[query, value],
        fan_in_fan_out=isinstance(projection, Conv1D),
        modules_to_save=["linear_attn"] if has_parameters else None,
    )
    wrapped = get_peft_model(model, config)
    torch.testing.assert_close(hidden(wrapped, **batch), expected)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
    wrapped.train()
    for _ in range(2):
        optimizer.zero_grad()
        wrapped(**batch).last_hidden_state[..., ::2].sum().backward()
        optimizer.step()
    wrapped.eval()
    trained = hidden(wrapped, **batch)
    assert not torch.equal(trained, expected)
    wrapped.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(converted(variant, family), tmp_path)
    torch.testing.assert_close(hidden(fresh, **batch), trained, atol=1e-5, rtol=1e-5)
    merged = wrapped.merge_and_unload()
    torch.testing.assert_close(hidden(merged, **batch), trained, atol=1e-4, rtol=1e-3)


class _Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Shapes of every tensor an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


@over(LINEAR_PAIRS)
def test_no_tensor_of_length_by_length(variant: str, family: str) -> None:
    length = 1500
    model = convert_model(base_model(family), variant, max_length=length, **long_options(variant, family))
    batch = token_batch(batch=1, length=length)
    batch["attention_mask"][0, 1400:] = 0
    with _Recorder() as recorder:
        hidden(model, **batch)
    offenders = [shape for shape in recorder.shapes if sum(side >= 1400 for side in shape) > 1]
    assert offenders == []


@every_pair
def test_model_is_a_module_like_any_other(variant: str, family: str) -> None:
    model = converted(variant, family)
    assert isinstance(model, nn.Module)
    assert model.base_model is model
    assert model.config.model_type == f"linear_attn_{family}"
    moved = copy.deepcopy(model).double()
    batch = token_batch()
    torch.testing.assert_close(hidden(moved, **batch).float(), hidden(model, **batch), atol=1e-3, rtol=1e-3)
