"""Masks and positions mean what they mean to softmax attention in the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import causal_mask_function

from hf_linear_attn import attention, convert_model
from hf_linear_attn.registry import get_patcher
from tests.test_packing import converted
from tests.tiny import (
    FAMILIES,
    PAD,
    VOCAB,
    base_model,
    build,
    cached,
    causal_lm,
    is_causal,
    main_family,
    over,
    representative_variants,
    small_options,
    thorough_pairs,
    tiny_config,
    token_batch,
    variants_for,
    without_dropout,
)

ENCODERS = [family for family in FAMILIES if not is_causal(family)]
DECODERS = [family for family in FAMILIES if is_causal(family)]
MAIN = {main_family(False), main_family(True)}
# Methods that can be softmax exactly, on either side.
EXACT: dict[str, dict[str, Any]] = {
    "longformer": {"window_size": 128, "num_global_tokens": 0},
    "entmax": {"alpha": "learned", "initial_lambda": 0.0},
    "memory": {"form": "chunked"},
}


def twins(family: str, method: str, head: Any = base_model) -> tuple[Any, Any]:
    """The model with softmax attention, and the one that was converted to a method that equals it."""
    model = head(family, **without_dropout(family))
    return model, convert_model(head(family, **without_dropout(family)), method, **EXACT[method])


def assert_same(left: torch.Tensor, right: torch.Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


# --- positions ----------------------------------------------------------------------------------------------------


def odd_positions(family: str, length: int) -> dict[str, torch.Tensor]:
    start = get_patcher(family).position_offset(tiny_config(family))
    return {
        "constant": torch.zeros(1, length, dtype=torch.long) + start,
        "repeating": torch.arange(length)[None] % 7 + start,
        "backwards": torch.arange(length).flip(0)[None] + start,
        "with gaps": torch.arange(length)[None] * 3 + start,
    }


@pytest.mark.parametrize("method", ["entmax", "longformer"])
@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("masked", [None, "ones", "right"])
@torch.no_grad()
def test_an_encoders_positions_are_positions(family: str, method: str, masked: str | None) -> None:
    softmax, model = twins(family, method)
    ids = token_batch(length=20)["input_ids"]
    mask = None if masked is None else torch.ones_like(ids)
    if masked == "right":
        mask[0, 15:] = 0
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    for at in odd_positions(family, 20).values():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": at.expand(2, -1)}
        expected = softmax(**given).last_hidden_state
        assert_same(model(**given).last_hidden_state[real], expected[real])
        assert_same(model.forward(**given).last_hidden_state[real], expected[real])


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@torch.no_grad()
def test_encoders_compile_and_export_with_any_positions(family: str) -> None:
    model: Any = convert_model(base_model(family, num_hidden_layers=1, **without_dropout(family)), "linear")
    ids = token_batch(length=20)["input_ids"]
    for mask in (None, torch.ones_like(ids)):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(20).expand(2, -1)}
        exported = torch.export.export(model, (), given, strict=False).module()
        for at in odd_positions(family, 20).values():
            given["position_ids"] = at.expand(2, -1).contiguous()
            expected = model(**given).last_hidden_state
            assert_same(compiled(**given).last_hidden_state, expected)
            assert_same(exported(**given).last_hidden_state, expected)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_decoders_read_packing_off_positions_as_upstream_does(family: str, method: str) -> None:
    """With neither mask nor cache; a mask of ones or a cache make them positions and nothing else."""
    softmax, model = twins(family, method)
    ids = token_batch(length=20)["input_ids"]
    for what, at in odd_positions(family, 20).items():
        at = at.expand(2, -1)
        for extra in (
            {"use_cache": False},
            {"use_cache": False, "attention_mask": torch.ones_like(ids)},
            {"use_cache": True},
            {"cache": "new"},
        ):
            results = []
            for subject in (softmax, model):
                given = cached(subject, DynamicCache()) if "cache" in extra else extra
                results.append(subject(input_ids=ids, position_ids=at, **given).last_hidden_state)
            torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4, msg=f"{what} {extra}")


@torch.no_grad()
def test_positions_that_look_like_packing_beside_a_cache_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = convert_model(base_model("gpt2"), "linear")
    said: list[str] = []
    monkeypatch.setattr(attention.logger, "warning_once", said.append)
    ids = token_batch(length=20)["input_ids"]
    packed, plain = (torch.arange(20) % 7).expand(2, -1), torch.arange(20).expand(2, -1)
    model(input_ids=ids, position_ids=packed, use_cache=False)
    model(input_ids=ids, position_ids=packed, attention_mask=torch.ones_like(ids))
    model(input_ids=ids, position_ids=plain)
    assert not said
    model(input_ids=ids, position_ids=packed)
    assert len(said) == 1
    assert "use_cache=False" in said[0]


@torch.no_grad()
def test_encoders_turned_decoders_hand_no_positions_to_their_mask() -> None:
    softmax = causal_lm("bert", **without_dropout("bert"))
    model = convert_model(causal_lm("bert", **without_dropout("bert")), "entmax", **EXACT["entmax"])
    ids, at = token_batch(length=20)["input_ids"], (torch.arange(20) % 7).expand(2, -1)
    results = [m(input_ids=ids, position_ids=at, use_cache=False).logits for m in (softmax, model)]
    assert_same(results[1], results[0])


# --- generation ---------------------------------------------------------------------------------------------------


def padded_prompt(side: str, rows: int = 2) -> dict[str, torch.Tensor]:
    batch = token_batch(batch=rows, length=14)
    masked = {"right": slice(9, None), "left": slice(0, 5), "interior": slice(4, 9)}[side]
    batch["attention_mask"][0, masked] = 0
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PAD)
    return batch


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "interior"])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_equals_softmax_wherever_the_prompt_is_padded(
    family: str, method: str, side: str, use_cache: bool
) -> None:
    batch = padded_prompt(side)
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    kwargs |= {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
    theirs, ours = (model.generate(**batch, **kwargs) for model in twins(family, method, causal_lm))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_same(torch.stack(ours.logits), torch.stack(theirs.logits))
    other = token_batch(batch=2, length=14, seed=1)["input_ids"]
    other = other.masked_fill(batch["attention_mask"] == 0, PAD)
    model = twins(family, method, causal_lm)[1]
    swapped = model.generate(**{**batch, "input_ids": other}, **kwargs)
    assert not torch.allclose(swapped.logits[0], ours.logits[0]), "the prompt does not matter"


# --- the mask's shape ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direct", [False, True])
@torch.no_grad()
def test_a_mask_of_another_shape_is_refused(family: str, direct: bool) -> None:
    model = converted("linear", family)
    call = model.forward if direct else model
    extra = {"use_cache": False} if is_causal(family) else {}
    ids = token_batch(length=8)["input_ids"]
    padded = torch.tensor([[0, 0, *[1] * 6], [1] * 8])
    for bad in (
        torch.ones(2, 10),
        torch.ones(2, 6),
        torch.nn.functional.pad(padded, (2, 0)),
        torch.nn.functional.pad(padded, (0, 2)),
        padded[:, 2:],
        torch.ones(1, 8),
        torch.ones(3, 8),
        padded[:1],
    ):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*\(2, 8\)"):
            call(input_ids=ids, attention_mask=bad.long(), **extra)


@pytest.mark.parametrize("layers", [None, [0], [1]])
@torch.no_grad()
def test_a_mask_beside_a_cache_covers_past_and_new_tokens(layers: list[int] | None) -> None:
    model = convert_model(base_model("gpt2"), "linear", layers=layers)
    ids, cache = token_batch(length=8)["input_ids"], DynamicCache()
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    model(input_ids=ids, attention_mask=mask[:, :8], **cached(model, cache))
    for short in (mask[:, :9], mask[:, -2:]):
        with pytest.raises(ValueError, match="attention_mask has shape"):
            model(input_ids=ids[:, :2], attention_mask=short, **cached(model, cache))
    # Refused before anything changed.
    assert cache.get_seq_length() == 8
    out = model(input_ids=ids[:, :2], attention_mask=mask, **cached(model, cache)).last_hidden_state
    whole = torch.cat([ids, ids[:, :2]], 1)
    expected = model(input_ids=whole, attention_mask=mask, use_cache=False).last_hidden_state[:, -2:]
    assert_same(out, expected)


# --- masked positions ---------------------------------------------------------------------------------------------


def attention_outputs(model: Any, **kwargs: Any) -> list[torch.Tensor]:
    """What attention gives in every layer, `[B, T, H, D]`."""
    found = []
    key = model.config._attn_implementation
    original = attention.linear_attention_forward

    def recording(*args: Any, **given: Any) -> Any:
        out = original(*args, **given)
        found.append(out[0])
        return out

    AttentionInterface.register(key, recording)
    try:
        with torch.no_grad():
            model(**kwargs)
    finally:
        AttentionInterface.register(key, original)
    return found


def layouts(length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(4, length, dtype=torch.long)
    share = torch.tensor([[0], [2], [length // 2], [length - 3]])
    place = torch.arange(length)
    generator = torch.Generator().manual_seed(0)
    return {
        "left": (place >= share).long() * mask,
        "right": (place < length - share).long() * mask,
        "interior": (torch.rand(4, length, generator=generator) >= share / length).long(),
    }


@over(thorough_pairs())
def test_masked_positions_are_zero_but_for_the_last_that_generation_reads(variant: str, family: str) -> None:
    for layers in (None, [0]):
        model = converted(variant, family, layers=layers)
        extra = {"use_cache": False} if is_causal(family) else {}
        for side, mask in layouts(40).items():
            ids = token_batch(4, 40)["input_ids"]
            for share, rows in (("much", slice(None)), ("little", slice(0, 2))):
                masked = mask[rows] == 0
                if is_causal(family):
                    masked[:, -1] = False
                for layer in attention_outputs(model, input_ids=ids[rows], attention_mask=mask[rows], **extra):
                    assert (layer[masked] == 0).all(), f"{side}, {share} padding, layers={layers}"


@over([(variant, family) for family in sorted(MAIN) for variant in variants_for(family)])
@torch.no_grad()
def test_a_row_does_not_depend_on_batch_mates_at_masked_positions_either(variant: str, family: str) -> None:
    for layers in (None, [0], [1]):
        model = converted(variant, family, layers=layers)
        caches = [{"use_cache": False}, {"use_cache": True}] if is_causal(family) else [{}]
        for mask in layouts(40).values():
            ids = token_batch(4, 40)["input_ids"]
            expected = [
                model(input_ids=i[None], attention_mask=m[None], **caches[0])[0][0]
                for i, m in zip(ids, mask, strict=True)
            ]
            for extra in caches:
                together = model(input_ids=ids, attention_mask=mask, **extra)[0]
                torch.testing.assert_close(together, torch.stack(expected), atol=5e-5, rtol=1e-4)


@over([(variant, family) for family in DECODERS for variant in representative_variants(family)])
@pytest.mark.parametrize("layers", [None, [0], [1]])
@torch.no_grad()
def test_left_padding_moves_no_logit(variant: str, family: str, layers: list[int] | None) -> None:
    """Also where real tokens have padding between and after them."""
    model = causal_lm(family, **without_dropout(family))
    convert_model(model, variant, layers=layers, **small_options(variant, family))
    batch = token_batch(4, 7)
    batch["attention_mask"] = torch.tensor(
        [[1] * 7, [1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    )

    def logits(pads: int) -> torch.Tensor:
        ids = torch.nn.functional.pad(batch["input_ids"], (pads, 0), value=PAD)
        mask = torch.nn.functional.pad(batch["attention_mask"], (pads, 0))
        at = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        return model(input_ids=ids, attention_mask=mask, position_ids=at).logits[:, -1]

    torch.testing.assert_close(logits(32), logits(0), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(MAIN))
@torch.no_grad()
def test_compiled_graphs_keep_the_rule(family: str) -> None:
    model: Any = build(type(base_model(family)), tiny_config(family, num_hidden_layers=1, **without_dropout(family)))
    convert_model(model, "linear")
    extra = {"use_cache": False} if is_causal(family) else {}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in layouts(24).values():
        given = {"input_ids": token_batch(4, 24)["input_ids"], "attention_mask": mask, **extra}
        assert_same(compiled(**given).last_hidden_state, model(**given).last_hidden_state)


# --- what a converted model says of itself ------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("layers", [None, [0]])
def test_generation_that_rolls_a_cache_back_is_refused_before_the_first_token(
    family: str, layers: list[int] | None
) -> None:
    model = convert_model(causal_lm(family), "linear", layers=layers)
    batch = token_batch(batch=1, length=12)
    ran = []
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    for extra in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": causal_lm(family)}):
        with pytest.raises(ValueError, match=r"cache of a converted layer cannot be cropped"):
            model.generate(**batch, max_new_tokens=4, pad_token_id=PAD, **extra)
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(**batch, max_new_tokens=4, pad_token_id=PAD, cache_implementation="static")
    assert not ran
    assert model._is_stateful
    assert not type(model)._can_compile_fullgraph
    assert not type(model)._supports_context_parallel
    model.set_attn_implementation("sdpa")
    plain = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
    looked_up = model.generate(**batch, max_new_tokens=8, do_sample=False, pad_token_id=PAD, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, looked_up)
    assert int(plain.max()) < VOCAB


def test_a_padded_mask_is_no_packing_to_an_assistant() -> None:
    """A converted model that drafts for another: both get the mask of a padded prompt."""
    main = causal_lm("gpt2")
    batch = padded_prompt("right", rows=1)
    kwargs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    expected = main.generate(**batch, **kwargs)
    draft = convert_model(causal_lm("gpt2"), "linear")
    draft.set_attn_implementation("sdpa")
    assert torch.equal(main.generate(**batch, assistant_model=draft, **kwargs), expected)


# --- what is read of a mask ---------------------------------------------------------------------------------------


def test_the_mask_function_reads_no_mask_on_a_device() -> None:
    """The meta device has no values to read: there `bool` raises. Whole models are in `test_on_gpu`."""
    call = {"batch_size": 2, "mask_function": causal_mask_function}
    on_device = torch.ones(2, 7, dtype=torch.bool, device="meta")
    for step in ({"q_length": 7}, {"q_length": 1, "q_offset": 6}):
        got = attention.linear_attention_mask(**call, **step, kv_length=7, attention_mask=on_device, device="meta")
        assert got.device.type == "meta"
        assert got.shape == (2, 7)
    on_host = torch.ones(2, 7, dtype=torch.bool)
    assert attention.linear_attention_mask(**call, q_length=7, kv_length=7, attention_mask=on_host) is None


def test_a_cache_after_a_refused_piece_is_refused_in_a_sentence() -> None:
    """The refused piece counted its tokens before it was refused: the mask of the next call is of other tokens."""
    model = convert_model(causal_lm("gpt2"), "linear")
    ids, cache = token_batch(batch=2, length=12)["input_ids"], DynamicCache(config=model.config)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    with torch.no_grad():
        model(input_ids=ids[:, :5], attention_mask=mask[:, :5], **cached(model, cache))
        ended = mask.clone()
        ended[0, 7] = 0
        with pytest.raises(ValueError, match="A piece of a prompt ends in padding"):
            model(input_ids=ids[:, 5:8], attention_mask=ended[:, :8], **cached(model, cache))
        with pytest.raises(ValueError, match="An earlier forward probably failed half-way; start from a new cache"):
            model(input_ids=ids[:, 8:], attention_mask=mask, **cached(model, cache))
