"""The tokens of a question and of a second text, against Transformers' own choice and against words one by one."""

import pytest
import torch
from transformers.models.longformer.modeling_longformer import _compute_global_attention_mask

from hf_linear_attn.ops.base.packing import plan_sequences, sequence_begins
from hf_linear_attn.ops.base.text_pairs import CallTokens, first_text, second_text, tokens_of_task, tokens_with_ids

BOS, PAD, SEP = 0, 1, 2
TEXTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [], [14, 15]]


def roberta_pair(a, b):
    return [BOS, *a, SEP, SEP, *b, SEP]


def places(mask):
    return [row.nonzero()[:, 0].tolist() for row in mask]


def padded(rows, side, fill):
    """Rows as one tensor, and which of it is real; `interior` puts a pad behind every token."""
    length = 2 * max(map(len, rows))
    out, real = torch.full((len(rows), length), fill), torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row)
        where = {"right": slice(0, n), "left": slice(length - n, length), "interior": slice(0, 2 * n, 2)}[side]
        out[i, where], real[i, where] = torch.tensor(row), True
    return out, real


@pytest.mark.parametrize("before", [True, False])
def test_separators_give_what_transformers_gives(before):
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    for a, b in pairs:
        ids = torch.tensor([roberta_pair(a, b)])
        ours = (first_text if before else second_text)(CallTokens(torch.ones_like(ids).bool(), None, ids, None, SEP))
        assert torch.equal(ours, _compute_global_attention_mask(ids, SEP, before_sep_token=before))


@pytest.mark.parametrize("side", ["right", "left", "interior"])
@pytest.mark.parametrize("second", [False, True])
def test_padding_may_stand_anywhere_and_is_never_chosen(side, second):
    pairs = [(TEXTS[0], TEXTS[2]), (TEXTS[2], TEXTS[1]), (TEXTS[1], TEXTS[4])]
    rows = [roberta_pair(a, b) for a, b in pairs]
    ids, real = padded(rows, side, SEP)  # padding that looks like a separator
    mask = (second_text if second else first_text)(CallTokens(real, None, ids, None, SEP))
    for i, (a, _) in enumerate(pairs):
        ranks = real[i].nonzero()[:, 0].tolist()
        wanted = range(len(a) + 3, len(rows[i])) if second else range(len(a) + 1)
        assert places(mask)[i] == [ranks[rank] for rank in wanted]


@pytest.mark.parametrize("side", ["right", "left", "interior"])
def test_token_types_say_it_where_there_are_any(side):
    """BERT's form, its separator unknown; a question of two parts is one text; padding of type 0 or 1."""
    rows = [[BOS, 5, SEP, 6, SEP, 7, 8, SEP], [BOS, 5, SEP, 6, SEP]]
    types = [[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    for fill in (0, 1):
        (ids, real), (kinds, _) = padded(rows, side, PAD), padded(types, side, fill)
        for separator in (None, SEP):
            call = CallTokens(real, None, ids, kinds, separator)
            for mask, kind in ((first_text(call), 0), (second_text(call), 1)):
                for i, row in enumerate(types):
                    ranks = real[i].nonzero()[:, 0].tolist()
                    assert places(mask)[i] == [ranks[r] for r, own in enumerate(row) if own == kind]


def test_a_separator_of_one_token_ends_a_text():
    """DistilBERT's form: nothing stands between a separator and the second text."""
    ids = torch.tensor([[BOS, 5, 6, SEP, 7, 8, SEP]])
    call = CallTokens(torch.ones_like(ids).bool(), None, ids, torch.zeros_like(ids), SEP)
    assert places(first_text(call)) == [[0, 1, 2]]
    assert places(second_text(call)) == [[4, 5, 6]]


def test_what_is_no_pair_has_its_first_token():
    ids, real = padded([[BOS, 5, 6, SEP], roberta_pair([5], [6])], "left", PAD)
    for choose in (first_text, second_text):
        found = places(choose(CallTokens(real, None, ids, None, SEP)))
        assert found[0] == [real.shape[1] - 4]
        assert len(found[1]) == 2
    assert first_text(CallTokens(real, None, ids)) is None  # nothing tells a text from another
    assert first_text(CallTokens(real, None, None, None, SEP)) is None


@pytest.mark.parametrize("by_types", [False, True])
@pytest.mark.parametrize("choose", [first_text, second_text])
def test_packed_sequences_are_looked_at_one_by_one(by_types, choose):
    texts = [roberta_pair(TEXTS[0], TEXTS[2]), [BOS, 5, SEP], roberta_pair(TEXTS[4], TEXTS[1]), roberta_pair([5], [])]
    types = [[0] * 6 + [1] * (len(texts[0]) - 6), [0] * 3, [0] * 5 + [1] * (len(texts[2]) - 5), [0] * 4 + [1]]

    def alone(text, kinds):
        ids, kinds = torch.tensor([text]), torch.tensor([kinds])
        return choose(CallTokens(torch.ones_like(ids).bool(), None, ids, kinds if by_types else None, SEP))

    expected = torch.cat([alone(*pair) for pair in zip(texts, types, strict=True)], 1)
    ids, kinds = (torch.tensor([[x for row in rows for x in row]]) for rows in (texts, types))
    lengths = torch.tensor([0, *map(len, texts)])
    plan = plan_sequences(1, ids.shape[1], cu_seq_lens=lengths.cumsum(0))
    begins = sequence_begins(plan, 1, ids.shape[1])
    assert begins[0].nonzero()[:, 0].tolist() == lengths.cumsum(0)[:-1].tolist()
    call = CallTokens(torch.ones_like(ids).bool(), begins, ids, kinds if by_types else None, SEP)
    assert torch.equal(choose(call), expected)


def test_ids_are_marked_wherever_they_stand():
    ids, real = padded([[BOS, 5, 6, 5], [7, 8]], "left", 5)
    for wanted, expected in ((5, [[5, 7], []]), ((7, 6), [[6], [6]])):
        assert places(tokens_with_ids(wanted).mark(CallTokens(real, None, ids))) == expected
    with pytest.raises(ValueError, match=r"global_token_ids=\[5\].*inputs_embeds"):
        tokens_with_ids(5).mark(CallTokens(real))


def test_other_tasks_have_no_choice():
    assert tokens_of_task("question-answering").mark is first_text
    assert tokens_of_task("multiple-choice").mark is second_text
    assert tokens_of_task(None) is tokens_of_task("text-classification") is None
