"""Questions to the model: in batches and rows of documents, in pieces with a cache, by generation."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from transformers import DynamicCache

from hf_linear_attn.seam.cache import find_cache
from tests.tiny import PAD, cached, is_causal
from tests.trust.reference import first_position, is_decoder
from tests.trust.user import LONGEST, Batch, Conversation, User, lengths, random_ids, seeds


class Asking(User):
    """Actions that change nothing but a cache."""

    @rule(
        row_lengths=lengths,
        where=st.sampled_from(["left", "right", "holes"]),
        seed=seeds,
        plain=st.booleans(),
        mode=st.sampled_from(["no_grad", "inference_mode", "grad"]),
        embeds=st.booleans(),
        autocast=st.sampled_from([False, False, True]),
    )
    def forward(
        self, row_lengths: list[int], where: str, seed: int, plain: bool, mode: str, embeds: bool, autocast: bool
    ) -> None:
        batch = Batch.draw(row_lengths, where, seed)
        autocast = autocast and self.model.dtype == torch.float32
        context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[mode]
        given: dict[str, Any] = {"input_ids": batch.ids}
        if embeds:
            given = {"inputs_embeds": self.model.get_input_embeddings()(batch.ids).detach()}
        if not (plain and bool(batch.mask.all())):
            given["attention_mask"] = batch.mask
        with context(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = self.model(**given, position_ids=batch.positions(first_position(self.model)))[0]
        outputs = [x.detach().clone() for x in batch.real_outputs(output)]
        self.reference().check("forward", outputs, batch.rows(), autocast)

    @precondition(lambda self: self.runs_variants)
    @rule(documents=lengths, seed=seeds)
    def packed(self, documents: list[int], seed: int) -> None:
        rows = [random_ids(torch.Generator().manual_seed(seed + i), n) for i, n in enumerate(documents)]
        given: dict[str, Any] = {"use_cache": False}
        if not is_decoder(self.model):
            given = {}
        if not is_causal(self.family):  # positions say nothing there, even of decoders
            given |= {"cu_seq_lens_q": torch.tensor([0, *documents]).cumsum(0).int()}
        if sum(documents) > LONGEST:
            return
        positions = torch.cat([torch.arange(n) for n in documents])[None] + first_position(self.model)
        with torch.no_grad(), self.may_refuse("packed"):
            output = self.model(input_ids=torch.cat(rows)[None], position_ids=positions, **given)[0][0]
            self.reference().check("packed", output.split(documents), rows)

    # --- with a cache ----------------------------------------------------------------------------------------------

    def talk(self, number: int) -> Conversation:
        return self.talks[number % len(self.talks)]

    @precondition(lambda self: is_decoder(self.model))
    @rule(
        row_lengths=lengths,
        where=st.sampled_from(["left", "right", "holes"]),
        seed=seeds,
        cuts=st.lists(seeds, max_size=3),
    )
    def prefill(self, row_lengths: list[int], where: str, seed: int, cuts: list[int]) -> None:
        """A prompt in one piece or several."""
        whole = Batch.draw(row_lengths, where, seed)
        length = whole.ids.shape[1]
        ends = sorted({cut % length for cut in cuts if cut % length} | {length})
        empty = Batch(whole.ids[:, :0], whole.mask[:, :0])
        talk = Conversation(empty, DynamicCache(config=self.model.config), self.version, self.kinds())
        self.talks = [*self.talks[-2:], talk]
        for start, end in zip([0, *ends], ends, strict=False):
            self.say(talk, Batch(whole.ids[:, start:end], whole.mask[:, start:end]), plain=False)

    def say(self, talk: Conversation, more: Batch, plain: bool, what: str = "piece") -> None:
        """Hand on new places, and check what comes back."""
        new = more.ids.shape[1]
        batch = Batch(torch.cat([talk.batch.ids, more.ids], 1), torch.cat([talk.batch.mask, more.mask], 1))
        if batch.ids.shape[1] > LONGEST:
            return
        stands = talk.version == self.version and not talk.broken
        kwargs = {"use_cache": True, **cached(self.model, talk.cache)}
        try:
            with torch.no_grad():
                output = self.call(batch, new, plain, **kwargs)
        except Exception as error:
            self.refusal(what, error)
            talk.broken = True
            return
        is_empty = talk.batch.ids.shape[1] == 0  # and so the softmax layers may have it
        assert is_empty or all(a == b for a, b in zip(talk.kinds, self.kinds(), strict=False)), (
            f"a cache of {talk.kinds} was read by layers that run {self.kinds()}"
        )
        talk.batch, talk.kinds = batch, self.kinds() if is_empty else talk.kinds
        if talk.version == self.version:
            label = f"{what} of a cache" + ("" if stands else " after an error")
            self.reference().check(label, batch.real_outputs(output), batch.rows())

    @precondition(lambda self: self.talks and is_decoder(self.model))
    @rule(number=seeds, new=st.sampled_from([1, 1, 1, 2, 5, 11]), seed=seeds, plain=st.booleans())
    def go_on(self, number: int, new: int, seed: int, plain: bool) -> None:
        talk = self.talk(number)
        ids = random_ids(torch.Generator().manual_seed(seed), len(talk.batch.ids), new)
        self.say(talk, Batch(ids, torch.ones_like(ids)), plain)

    @precondition(lambda self: self.talks and is_decoder(self.model))
    @rule(number=seeds, seed=seeds, how=st.sampled_from(["reorder", "select", "repeat"]))
    def rows_of_a_cache(self, number: int, seed: int, how: str) -> None:
        talk = self.talk(number)
        count = len(talk.batch.ids)
        if how == "repeat":
            if count > 4:
                return
            talk.cache.batch_repeat_interleave(2)
            rows = torch.arange(count).repeat_interleave(2)
        else:
            kept = count if how == "reorder" else 1 + seed % count
            rows = torch.randint(count, (kept,), generator=torch.Generator().manual_seed(seed))
            (talk.cache.reorder_cache if how == "reorder" else talk.cache.batch_select_indices)(rows)
        talk.batch = Batch(talk.batch.ids[rows], talk.batch.mask[rows])

    @precondition(lambda self: self.talks and is_decoder(self.model))
    @rule(number=seeds, how=st.sampled_from(["reset", "crop", "crop", "fork", "pickle"]), by=st.integers(1, 4))
    def change_a_cache(self, number: int, how: str, by: int) -> None:
        talk = self.talk(number)
        if how == "reset":
            talk.cache.reset()
            talk.batch = Batch(talk.batch.ids[:, :0], talk.batch.mask[:, :0])
            talk.version, talk.kinds, talk.broken = self.version, self.kinds(), False
        elif how == "fork":
            self.talks = [*self.talks[-2:], replace(talk, cache=copy.deepcopy(talk.cache))]
        elif how == "pickle":
            file = io.BytesIO()
            torch.save(talk.cache, file)
            file.seek(0)
            talk.cache = torch.load(file, weights_only=False)
        elif by < talk.batch.ids.shape[1]:
            try:
                talk.cache.crop(-by)
            except Exception as error:
                self.refusal("crop", error)
                talk.broken = True
            else:
                talk.batch = Batch(talk.batch.ids[:, :-by], talk.batch.mask[:, :-by])

    # Generation numbers tokens from 0; RoBERTa begins behind its padding token.
    @precondition(lambda self: is_decoder(self.model) and first_position(self.model) == 0)
    @rule(
        row_lengths=lengths,
        seed=seeds,
        how=st.sampled_from(["greedy", "sample", "several", "beams", "chunks"]),
        cache=st.booleans(),
        new=st.integers(2, 9),
    )
    def generate(self, row_lengths: list[int], seed: int, how: str, cache: bool, new: int) -> None:
        if not is_causal(self.family):  # their generation numbers padding too
            row_lengths = row_lengths[:1]
        batch = Batch.draw(row_lengths, "left", seed)
        modes: dict[str, dict[str, Any]] = {
            "greedy": {"do_sample": False},
            "sample": {"do_sample": True},
            "several": {"do_sample": True, "num_return_sequences": 2},
            "beams": {"do_sample": False, "num_beams": 2},
            "chunks": {"do_sample": False, "prefill_chunk_size": 4},
        }
        given = {
            "input_ids": batch.ids,
            "attention_mask": batch.mask,
            "max_new_tokens": new,
            "min_new_tokens": new,
            "pad_token_id": PAD,
            "use_cache": cache,
            "output_logits": True,
            "return_dict_in_generate": True,
            **modes[how],
        }
        if how == "chunks" and not cache:
            return
        torch.manual_seed(seed)
        with self.may_refuse("generate"):
            out = self.model.generate(**given)
            sequences = out.sequences
            if how == "beams":
                torch.manual_seed(seed)
                other = self.model.generate(**{**given, "use_cache": not cache})
                if not torch.equal(other.sequences, sequences):  # a tie is decided by rounding
                    torch.testing.assert_close(other.sequences_scores, out.sequences_scores, atol=1e-2, rtol=1e-2)
                return
            repeats = len(sequences) // len(batch.ids)
            mask = torch.cat([batch.mask.repeat_interleave(repeats, 0), torch.ones(len(sequences), new - 1).long()], 1)
            grown = Batch(sequences[:, :-1], mask)
            logits = torch.stack(out.logits, 1)
            rows = grown.rows()
            self.reference().check(f"generate {how}, cache {cache}", list(logits), rows)
            left = find_cache(out.items())
            if cache and left is not None:
                self.talks = [*self.talks[-2:], Conversation(grown, left, self.version, self.kinds())]
