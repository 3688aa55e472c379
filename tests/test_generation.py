"""Generation with a constant-size state (or a window of keys) equals generation without a cache."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.cache_utils import EncoderDecoderCache

from hf_linear_attn import attention, convert_model, get_variant, list_variants, revert_model
from hf_linear_attn.seam.cache import LinearAttnCacheLayer
from hf_linear_attn.variants.base import AttentionVariant
from tests.tiny import (
    PAD,
    VOCAB,
    cached,
    causal_families,
    causal_lm,
    is_causal,
    main_family,
    over,
    representative_variants,
    small_options,
    token_batch,
)

VARIANTS = list_variants(decoder=True)
MAIN = main_family(causal=True)
# Every variant on every family of decoders; encoders that Transformers can turn into decoders, with two variants.
PAIRS = [(v, f) for f in causal_families() for v in (VARIANTS if is_causal(f) else representative_variants(MAIN))]


def converted(variant: str, family: str = MAIN, **kwargs: Any) -> GPT2LMHeadModel:
    return convert_model(causal_lm(family), variant, **small_options(variant, family, causal=True), **kwargs)


def left_padded(length: int = 21) -> dict[str, torch.Tensor]:
    batch = token_batch(batch=3, length=length)
    for row, pads in ((1, 6), (2, 13)):
        batch["input_ids"][row, :pads] = PAD
        batch["attention_mask"][row, :pads] = 0
    return batch


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 0.8},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 5},
}


# Modes that ask something else of the state, for every variant; beams reorder it in every family.
CASES = [(variant, MAIN, mode) for variant in VARIANTS for mode in ("greedy", "beam search", "chunked prefill")]
CASES += [(variant, MAIN, mode) for variant in representative_variants(MAIN) for mode in MODES]
CASES += [(variant, family, "beam search") for family in causal_families() for variant in representative_variants(MAIN)]
CASES = list(dict.fromkeys(CASES))


def _is_further(variant: str, family: str, mode: str) -> bool:
    """Beams read a state step by step and reorder it besides; pieces of a prompt are fed by hand below."""
    return mode != "beam search" and variant not in representative_variants(MAIN)


@pytest.mark.parametrize(
    ("variant", "family", "mode"),
    [pytest.param(*c, marks=pytest.mark.slow if _is_further(*c) else (), id="-".join(c)) for c in CASES],
)
def test_cached_generation_equals_uncached(variant: str, family: str, mode: str) -> None:
    model = converted(variant, family)
    kwargs = {"max_new_tokens": 30, "min_new_tokens": 30, "pad_token_id": PAD, **MODES[mode]}
    batch = left_padded()

    def generate(use_cache: bool) -> torch.Tensor:
        torch.manual_seed(0)
        extra = dict(kwargs) if use_cache else {k: v for k, v in kwargs.items() if k != "prefill_chunk_size"}
        return model.generate(**batch, use_cache=use_cache, **extra)

    tokens = generate(True)
    assert torch.equal(tokens, generate(False))
    assert tokens[:, 21:].unique().numel() > 3, "a degenerate model would pass anything"


@over(PAIRS)
def test_left_padding_equals_one_by_one(variant: str, family: str) -> None:
    model = converted(variant, family)
    batch = left_padded()
    kwargs = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    together = model.generate(**batch, **kwargs)[:, 21:]
    assert torch.equal(model.generate(**batch, use_cache=False, **kwargs)[:, 21:], together)
    if not is_causal(family):  # families of encoders number positions from the left edge, pads included
        together, batch = together[:1], {name: tensor[:1] for name, tensor in batch.items()}
    for row in range(together.shape[0]):
        real = batch["attention_mask"][row].bool()
        alone = model.generate(input_ids=batch["input_ids"][row : row + 1, real], **kwargs)[0, int(real.sum()) :]
        assert torch.equal(together[row], alone)


@pytest.mark.parametrize("on_host", [True, False])
def test_drawn_tokens_are_known_to_be_real(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mask on a GPU too, which nobody may read: `generate` says so."""
    masks: list[torch.Tensor | None] = []
    model = converted("longformer")
    for module in model.modules():
        if isinstance(module, AttentionVariant):
            module.register_forward_pre_hook(lambda _, args: masks.append(args[0].token_mask))
    if not on_host:
        monkeypatch.setattr(attention, "is_on_host", lambda _: False)
    model.generate(**left_padded(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=PAD)
    layers = model.config.n_layer
    assert all(x is not None for x in masks[:layers])
    assert masks[layers:] == [None] * (3 * layers)


@pytest.mark.parametrize("compiled", [False, True])
def test_another_mask_than_that_of_generate_is_asked(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop of one's own that puts padding among the tokens that were drawn, on a GPU or in a compiled graph."""
    model = converted("linear")
    ids = token_batch(batch=2, length=16)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 12] = mask[1, 14] = 0
    run = torch.compile(model, backend="eager") if compiled else model
    monkeypatch.setattr(attention, "is_on_host", lambda _: compiled)
    given: dict[str, Any] = {"attention_mask": mask[:, :10], **cached(model, DynamicCache(config=model.config))}
    with torch.no_grad():
        outputs = model(ids[:, :10], **given)
        for t in range(10, 16):
            given = model._update_model_kwargs_for_generation(outputs, given)
            given |= {"attention_mask": mask[:, : t + 1]}
            given.pop("position_ids", None)
            outputs = run(ids[:, t : t + 1], **given)
        wanted = model(ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(outputs.logits, wanted)


def test_padding_among_later_tokens_is_still_padding() -> None:
    """By hand: two new tokens at once, one of them padding in one row."""
    model = converted("longformer")
    ids = token_batch(batch=2, length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 10] = 0
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :10], attention_mask=mask[:, :10], **cached(model, cache))
        found = model(ids[:, 10:], attention_mask=mask, **cached(model, cache)).logits
        wanted = model(ids, attention_mask=mask).logits[:, 10:]
    torch.testing.assert_close(found[0, 1:], wanted[0, 1:])
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("chunks", [(30,), (1,) * 30, (7, 1, 15, 7), (29, 1)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hand_made_chunks_give_the_same_logits(variant: str, chunks: tuple[int, ...]) -> None:
    model = converted(variant)
    batch = token_batch(length=30)
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"], use_cache=False).logits
        cache, pieces = DynamicCache(), []
        for ids in batch["input_ids"].split(list(chunks), dim=1):
            pieces.append(model(input_ids=ids, **cached(model, cache)).logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-4, rtol=1e-4)
    assert cache.get_seq_length() == 30


def state_numbers(cache: DynamicCache) -> int:
    return sum(t.numel() for layer in cache.layers for t in layer.state.values())


@pytest.mark.parametrize("variant", [v for v in VARIANTS if get_variant(v).state in ("constant", "window")])
def test_the_state_does_not_grow(variant: str) -> None:
    model = converted(variant)
    sizes = []
    for length in (60, 120):
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=token_batch(length=length)["input_ids"], **cached(model, cache))
        assert all(isinstance(layer, LinearAttnCacheLayer) for layer in cache.layers)
        sizes.append(state_numbers(cache))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=() if v in representative_variants(MAIN) else pytest.mark.slow) for v in VARIANTS],
)
def test_hybrids_with_softmax_layers_generate_the_same(variant: str) -> None:
    for choice in ({0: variant}, {1: variant}):
        model = causal_lm(MAIN)
        options = small_options(variant, MAIN)
        convert_model(model, {index: (key, options) for index, key in choice.items()})
        kwargs = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": PAD}
        batch = left_padded()
        assert torch.equal(model.generate(**batch, **kwargs), model.generate(**batch, use_cache=False, **kwargs))


def test_caches_that_would_be_wrong_are_refused() -> None:
    model = converted("linear")
    ids = token_batch(length=10)["input_ids"]
    softmax = causal_lm(MAIN)
    cache = DynamicCache()
    with torch.no_grad():
        softmax(input_ids=ids, **cached(softmax, cache))
    with pytest.raises(ValueError, match="already holds 10 tokens"):
        model(input_ids=ids, **cached(model, cache))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(input_ids=ids, **cached(model, StaticCache(config=model.config, max_cache_len=32)))
    with pytest.raises(ValueError, match="DynamicCache"):
        model.generate(input_ids=ids, cache_implementation="static", max_new_tokens=3)
    with pytest.raises(ValueError, match="The cache is offloaded"):
        model.generate(input_ids=ids, cache_implementation="offloaded", max_new_tokens=3)
    offloaded = DynamicCache()
    offloaded.offloading = True  # what the constructor sets, beside a stream of a GPU
    with pytest.raises(ValueError, match="The cache is offloaded"):
        model(input_ids=ids, **cached(model, offloaded))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("linear", {}), ("linear", {"feature_map": "exp"})),  # states of the same names and shapes
        (("longformer", {"window_size": 8}), ("longformer", {"window_size": 4})),
        (("longformer", {"window_size": 8}), ("sparse", {})),
        (("linear", {}), ("efficient", {})),  # of other shapes
    ],
    ids=lambda choice: choice[0],
)
def test_the_state_of_another_conversion_is_refused(first: Any, second: Any) -> None:
    model = causal_lm(MAIN)
    ids, cache = token_batch(length=10)["input_ids"], DynamicCache()
    with torch.no_grad():
        convert_model(model, first[0], **first[1])
        model(input_ids=ids, **cached(model, cache))
        convert_model(revert_model(model), second[0], **second[1])
        with pytest.raises(ValueError, match=f"Layer 0 .*{first[0]}.*runs {second[0]}.*new cache"):
            model(input_ids=ids[:, :1], **cached(model, cache))
        convert_model(revert_model(model), first[0], **first[1])  # and again the one that the state is of
        model(input_ids=ids[:, :1], **cached(model, cache))


def test_keys_of_softmax_are_refused_before_a_layer_takes_more_of_them() -> None:
    """A hybrid's softmax layers could read them: the converted ones must be asked first."""
    model = convert_model(causal_lm(MAIN), {1: "linear"})
    ids, cache = token_batch(length=12)["input_ids"], DynamicCache()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, -1:]
        model(input_ids=ids[:, :-1], **cached(model, cache))
        model.set_attn_implementation("linear_attn")
        with pytest.raises(ValueError, match="Layer 1 of the cache already holds 11 tokens"):
            model(input_ids=ids[:, :1], **cached(model, cache))
        model.set_attn_implementation("sdpa")
        after = model(input_ids=ids[:, -1:], **cached(model, cache)).logits
    torch.testing.assert_close(after, expected, atol=2e-4, rtol=1e-4)


def test_a_forward_that_failed_half_way_is_noticed() -> None:
    model = converted("linear")
    ids = token_batch(length=10)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids, **cached(model, cache))

        def fail(*_args: object) -> None:
            raise RuntimeError("interrupted")

        handle = model.transformer.h[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="interrupted"):
            model(input_ids=ids[:, :1], **cached(model, cache))
        handle.remove()
        with pytest.raises(ValueError, match="inconsistent"):
            model(input_ids=ids[:, :1], **cached(model, cache))


def test_cropping_is_refused_and_reset_starts_over() -> None:
    model = converted("linear")
    ids = token_batch(length=10)["input_ids"]
    cache = DynamicCache()
    with torch.no_grad():
        first = model(input_ids=ids, **cached(model, cache)).logits
        with pytest.raises(ValueError, match="cropped"):
            cache.crop(-3)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model(input_ids=ids, **cached(model, cache)).logits, first)


def test_batch_operations_on_the_cache() -> None:
    model = converted("performer")
    batch = token_batch(batch=2, length=10)
    ids, step = batch["input_ids"], torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = DynamicCache()
        model(input_ids=ids, **cached(model, cache))
        cache.batch_repeat_interleave(2)
        repeated = model(input_ids=step.repeat_interleave(2, dim=0), **cached(model, cache)).logits
        cache.batch_select_indices(torch.tensor([0, 2]))
        assert cache.layers[0].state is not None
        assert all(t.shape[0] == 2 for t in cache.layers[0].state.values())
        expected = model(input_ids=torch.cat([ids, step], dim=1)).logits[:, -1:]
    torch.testing.assert_close(repeated[::2], expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(repeated[0], repeated[1])


def test_threads_do_not_mix_up_calls() -> None:
    model = converted("linear")
    kwargs = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    prompts = [token_batch(batch=1, length=5 + i, seed=i)["input_ids"] for i in range(8)]
    expected = [model.generate(input_ids=p, attention_mask=torch.ones_like(p), **kwargs) for p in prompts]
    results: list[torch.Tensor | None] = [None] * 8

    def work(index: int) -> None:
        torch.set_num_threads(1)
        p = prompts[index]
        results[index] = model.generate(input_ids=p, attention_mask=torch.ones_like(p), **kwargs)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_cross_attention_stays_softmax_and_its_cache_is_unwrapped() -> None:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, add_cross_attention=True, pad_token_id=PAD
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    batch = token_batch(length=12)
    context = torch.randn(2, 9, 32)
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[0, 6:] = 0
    convert_model(model, "linear")
    kwargs = {"encoder_hidden_states": context, "encoder_attention_mask": padding}
    with torch.no_grad():
        full = model(input_ids=batch["input_ids"], use_cache=False, **kwargs).logits
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        pieces = [
            model(input_ids=ids, **cached(model, cache), **kwargs).logits for ids in batch["input_ids"].split(5, dim=1)
        ]
        poisoned = context.clone()
        poisoned[0, 6:] = 1e3
        same = model(
            input_ids=batch["input_ids"],
            use_cache=False,
            encoder_hidden_states=poisoned,
            encoder_attention_mask=padding,
        ).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(same, full, atol=1e-5, rtol=1e-5)
    assert len(model.conversion_report.rows) == 2


def test_global_attention_mask_is_rejected_by_generate() -> None:
    model = converted("longformer")
    batch = token_batch(length=10)
    with pytest.raises(ValueError, match="global_attention_mask"):
        model.generate(**batch, global_attention_mask=torch.zeros_like(batch["input_ids"]), max_new_tokens=2)


def test_a_later_piece_of_a_prompt_that_ends_in_padding_is_refused() -> None:
    """The one masked place that is read, and the keys it would need are gone."""
    model = converted("linear")
    batch = token_batch(length=24)
    batch["attention_mask"][0, -5:] = 0
    with pytest.raises(ValueError, match="Pad on the left"):
        model.generate(**batch, max_new_tokens=3, pad_token_id=PAD, prefill_chunk_size=7)


@pytest.mark.parametrize("variant", ["linear", "longformer", "reformer"])
def test_a_later_mask_cannot_hide_or_show_what_a_cache_holds(variant: str) -> None:
    model, ids = converted(variant).eval(), token_batch(length=8)["input_ids"]
    padded, all_real = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    padded[0, :3] = 0

    def step(before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor:
        cache = DynamicCache()
        model(ids, attention_mask=None if before is None else before[:, :8], **cached(model, cache))
        logits: torch.Tensor = model(ids[:, :1], attention_mask=after, **cached(model, cache)).logits
        return logits

    with torch.no_grad():
        for before, after in ((padded, padded), (None, None), (None, all_real), (all_real, None)):
            assert step(before, after).isfinite().all()
        moved = padded.flip(1)
        for before, after in ((padded, None), (padded, all_real), (None, padded), (all_real, padded), (padded, moved)):
            with pytest.raises(ValueError, match=r"token 0 of row 0 is (no )?padding, and was (none )?when"):
                step(before, after)


def test_a_compiled_step_between_two_others_forgets_which_tokens_were_padding() -> None:
    """Nobody looks at a mask within a graph, so that what an earlier call saw holds no more, nor is it compared."""
    model, ids = converted("linear").eval(), token_batch(length=11)["input_ids"]
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    cache, compiled = DynamicCache(), torch.compile(model, backend="eager")
    with torch.no_grad():
        model(ids[:, :9], attention_mask=mask[:, :9], **cached(model, cache))
        compiled(ids[:, 9:10], attention_mask=mask[:, :10], **cached(model, cache))
        last = model(ids[:, 10:], attention_mask=mask, **cached(model, cache)).logits
        whole = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(last[:, -1], whole[:, -1])


def test_padding_of_a_cache_follows_its_rows() -> None:
    model, ids, cache = converted("linear"), token_batch(length=8)["input_ids"], DynamicCache()
    padded = torch.ones(2, 8, dtype=torch.long)
    padded[0, :3] = 0
    with torch.no_grad():
        model(ids, attention_mask=padded, **cached(model, cache))
        for change, rows in ((cache.reorder_cache, [1, 0]), (cache.batch_select_indices, [0, 1, 1])):
            change(torch.tensor(rows))
            padded = F.pad(padded[rows], (0, 1), value=1)
            model(ids[:1, :1].expand(len(rows), -1), attention_mask=padded, **cached(model, cache))
        with pytest.raises(ValueError, match="token 0 of row 0 is padding, and was none when"):
            model(ids[:1, :1].expand(3, -1), attention_mask=F.pad(padded.flip(0), (0, 1)), **cached(model, cache))
        cache.batch_select_indices(torch.tensor([0]))  # without padding
        for mask in (None, torch.ones(1, 12)):
            model(ids[:1, :1], attention_mask=mask, **cached(model, cache))
