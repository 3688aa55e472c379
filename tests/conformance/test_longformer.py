"""Longformer's window and global attention as in Transformers: same weights, same inputs."""

import pytest
import torch
from transformers import LongformerConfig as UpstreamConfig
from transformers import (
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    RobertaConfig,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
)
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from hf_linear_attn import convert_model
from hf_linear_attn.variants.base import AttentionInputs, LayerContext
from hf_linear_attn.variants.longformer import LongformerAttention, LongformerConfig

pytestmark = pytest.mark.conformance

HEADS, DIM, WIDTH, WINDOW = 3, 8, 24, 8


def pair():
    """Two functions of (hidden `[B, T, C]`, padding, global mask), theirs and ours, with the same weights."""
    config = UpstreamConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        attention_window=[WINDOW],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    upstream = LongformerSelfAttention(config, 0).eval()
    context = LayerContext(0, 1, WIDTH, HEADS, DIM, 512, is_causal=False)
    variant = LongformerAttention(LongformerConfig(window_size=WINDOW), context)
    variant.load_state_dict({k: v for k, v in upstream.state_dict().items() if "global" in k})

    @torch.no_grad()
    def theirs(hidden, padding, mask):
        codes = torch.zeros(mask.shape).masked_fill(~padding, -10000.0).masked_fill(mask, 10000.0)
        return upstream(
            hidden,
            attention_mask=codes,
            is_index_masked=codes < 0,
            is_index_global_attn=codes > 0,
            is_global_attn=bool((codes > 0).any()),
        )[0]

    @torch.no_grad()
    def ours(hidden, padding, mask):
        projections = upstream.query, upstream.key, upstream.value
        q, k, v = (f(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in projections)
        inputs = AttentionInputs(q, k, v, padding, False, DIM**-0.5, hidden, mask)
        return variant(inputs)[0].transpose(1, 2).flatten(2)

    return theirs, ours


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tokens", [(), (0,), (0, 7, 30), tuple(range(12))], ids=len)
def test_equals_transformers_longformer(padded, tokens):
    """Lengths are a multiple of the window, as upstream needs; float32."""
    theirs, ours = pair()
    hidden = torch.randn(2, 48, WIDTH)
    padding = torch.arange(48) < torch.tensor([[48], [37]]) if padded else torch.ones(2, 48, dtype=torch.bool)
    mask = torch.zeros(2, 48, dtype=torch.bool)
    mask[:, list(tokens)] = True
    mask[1, list(tokens)[1:2]] = False  # rows differ in how many global tokens they have
    expected, actual = theirs(hidden, padding, mask), ours(hidden, padding if padded else None, mask)
    torch.testing.assert_close(actual[padding], expected[padding], atol=1e-4, rtol=1e-4)


def test_theirs_measures_distance_over_padding_and_ours_over_real_tokens():
    """With 16 pads in the middle of 48 real tokens theirs loses keys of its window; ours gives the same outputs."""
    theirs, ours = pair()
    hidden = torch.randn(1, 64, WIDTH)
    padding = (torch.arange(64) < 24) | (torch.arange(64) >= 40)
    mask = (torch.arange(64) == 0)[None]
    bare = hidden[:, padding], torch.ones(1, 48, dtype=torch.bool), mask[:, padding]
    alone = theirs(*bare)
    assert (theirs(hidden, padding[None], mask)[:, padding] - alone).abs().max() > 1e-2
    torch.testing.assert_close(ours(*bare), alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(hidden, padding[None], mask)[:, padding], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LongformerForQuestionAnswering, RobertaForQuestionAnswering),
        (LongformerForMultipleChoice, RobertaForMultipleChoice),
    ],
)
def test_heads_choose_the_global_tokens_that_theirs_choose(theirs, ours):
    """Whole models on pairs in RoBERTa's form, no mask of global tokens given."""
    options = {
        "vocab_size": 40,
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 32,
        "max_position_embeddings": 60,
        "type_vocab_size": 1,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_eps": 1e-12,
    }
    torch.manual_seed(0)
    upstream = theirs(UpstreamConfig(**options, attention_window=[WINDOW] * 2, sep_token_id=2, initializer_range=0.3))
    upstream.eval()
    model = convert_model(ours(RobertaConfig(**options)), "longformer", window_size=WINDOW).eval()
    renamed = {
        name.replace("longformer.", "roberta.", 1).replace(
            "self.", "self.linear_attn." if "_global" in name else "self."
        ): weight
        for name, weight in upstream.state_dict().items()
    }
    assert not model.load_state_dict(renamed, strict=False).missing_keys
    questions, contexts = torch.randint(3, 40, (2, 2, 40)).unbind()
    rows = []
    for length, question, context in zip((3, 9), questions.tolist(), contexts.tolist(), strict=True):
        rows.append([0, *question[:length], 2, 2, *context[: 40 - 4 - length], 2])
    ids = torch.tensor(rows)
    ids = ids[None] if "Choice" in theirs.__name__ else ids
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected, actual = upstream(**batch)[0], model(**batch)[0]
        first = torch.zeros_like(ids)
        first[..., 0] = 1
        assert (model(**batch, global_attention_mask=first)[0] - expected).abs().max() > 1e-2
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
