"""Retrieval without training: the metrics by brute force, what each system reads, runs that resume, clear mistakes."""

from __future__ import annotations

import json
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_linear_attn import convert_model, get_variant
from hf_linear_attn.analysis.recordings import document_batches
from hf_linear_attn.bench.retrieval.corpus import build_corpus, near_duplicates, take_passages
from hf_linear_attn.bench.retrieval.pictures import draw_retrieval
from hf_linear_attn.bench.retrieval.recipe import (
    CalibrationRecipe,
    DocumentsRecipe,
    PassagesRecipe,
    RetrievalRecipe,
    SystemRecipe,
)
from hf_linear_attn.bench.retrieval.run import measure_retrieval
from hf_linear_attn.bench.retrieval.scores import rank_documents, summarize
from hf_linear_attn.bench.retrieval.systems import Embedder, build_embedder, embed, load_encoder, pieces_of
from hf_linear_attn.bench.retrieval.tables import (
    measured_lengths,
    render_headline,
    render_overview,
    render_retrieval,
    verdict,
)
from hf_linear_attn.measure.methods import RefusedError
from tests.small_runs import FILLER, WORDS, save_checkpoint

ROOT = Path(__file__).parents[2]
LIMIT = 64  # of the tiny checkpoint
HEAD = 200  # tokens that all planted documents begin with
OWN = [[*FILLER, *WORDS["fruit"], *WORDS["metal"]][3 * i : 3 * i + 3] for i in range(1, 8)]


def silent(line: str) -> None:
    assert line


def save_planted(folder: Path) -> Path:
    """Documents that begin alike and go on in three words of their own, of seven; four in each part."""
    draw = random.Random(0)
    for split in ("train", "test"):
        for index, words in enumerate(OWN[:4] if split == "train" else OWN):
            place = folder / split / f"label{index % 2}"
            place.mkdir(parents=True, exist_ok=True)
            tail = [draw.choice(words) for _ in range(400)]
            (place / f"{index}.txt").write_text(" ".join(["w0"] * HEAD + tail))
    return folder


@pytest.fixture
def recipe(tmp_path: Path, past_only: str) -> RetrievalRecipe:
    return RetrievalRecipe(
        model=str(save_checkpoint(tmp_path / "tiny")),
        documents=DocumentsRecipe(str(save_planted(tmp_path / "documents")), min_tokens=300),
        passages=PassagesRecipe(tokens=16, count=3, margin=2),
        calibration=CalibrationRecipe(documents=2, tokens=48),
        lengths=[512, 256],
        short_lengths=[32],
        cost_repeats=1,
        num_resamples=50,
        systems=[
            SystemRecipe(reads="truncated"),
            SystemRecipe(reads="head_tail"),
            SystemRecipe(reads="chunks"),
            SystemRecipe(reads="chunks", overlap=8),
            SystemRecipe(),
            SystemRecipe(variant={"longformer": {"window_size": 8}}),
            SystemRecipe(variant="linear"),
            SystemRecipe(variant="linear", start="published", extend="interpolate"),
            SystemRecipe(variant=past_only),
        ],
    )


def embedder_of(recipe: RetrievalRecipe, system: SystemRecipe, room: int | None = None) -> Embedder:
    checkpoint = load_encoder(recipe.model)
    return build_embedder(system, checkpoint, room, batches_of(recipe), seed=0)


def batches_of(recipe: RetrievalRecipe) -> list[dict[str, Any]]:
    """What calibrated starts are chosen on."""
    checkpoint, wanted = load_encoder(recipe.model), recipe.calibration
    corpus = build_corpus(recipe.documents, recipe.passages, checkpoint.tokenizer)
    return document_batches(corpus.calibration, checkpoint.tokenizer, wanted.tokens, wanted.documents)


# ---------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------


def test_ranks_and_gaps_are_those_of_brute_force() -> None:
    rng = np.random.default_rng(0)
    documents = rng.normal(size=(17, 5))
    queries = rng.normal(size=(40, 5))
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    owners = rng.integers(17, size=40)
    ranks, gaps = rank_documents(queries, documents, owners)
    for index, (query, owner) in enumerate(zip(queries, owners, strict=True)):
        cosines = [float(sum(a * b for a, b in zip(query, document, strict=True))) for document in documents]
        order = sorted(range(17), key=lambda document: -cosines[document])
        assert ranks[index] == order.index(owner) + 1
        assert gaps[index] == pytest.approx(cosines[owner] - max(c for d, c in enumerate(cosines) if d != owner))
    groups = [f"g{owner % 5}" for owner in owners]
    found = summarize({"ranks": ranks.tolist(), "gaps": gaps.tolist()}, groups, {}, 100)
    assert found["top1"]["mean"] == pytest.approx(sum(rank == 1 for rank in ranks) / 40)
    assert found["mrr"]["mean"] == pytest.approx(sum(1 / rank for rank in ranks) / 40)
    assert found["top1"]["low"] <= found["top1"]["mean"] <= found["top1"]["high"]


def test_equal_vectors_find_nothing() -> None:
    same = np.ones((4, 1))
    ranks, gaps = rank_documents(np.ones((2, 1)), same, np.array([0, 3]))
    assert ranks.tolist() == [4, 4]
    assert gaps.tolist() == [0, 0]


def test_differences_are_paired() -> None:
    groups = [f"g{i}" for i in range(20)]
    good = {"ranks": [1] * 20, "gaps": [0.1] * 20}
    bad = {"ranks": [1] * 10 + [2] * 10, "gaps": [0.0] * 20}
    less = summarize(good, groups, {"bad": bad, "good": good}, 200)["top1_less"]
    assert list(less) == ["bad"]  # not with itself
    assert less["bad"]["mean"] == 0.5
    assert less["bad"]["low"] > 0


# ---------------------------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_nothing_of_a_passage_or_its_margin_is_left(seed: int) -> None:
    passages = PassagesRecipe(tokens=10, count=4, margin=3)
    left, taken = take_passages(range(130), passages, np.random.default_rng(seed))
    assert [len(passage) for passage in taken] == [10] * 4
    assert len(left) == 130 - passages.taken
    assert left == sorted(left)
    gone = {place for passage in taken for place in range(passage[0] - 3, passage[-1] + 4)}
    assert len(gone) == passages.taken  # they do not overlap
    assert gone.isdisjoint(left)


def test_passages_are_drawn_from_the_beginning_where_that_is_asked_for() -> None:
    passages = PassagesRecipe(tokens=8, count=2, margin=1, within=40)
    for seed in range(20):
        left, taken = take_passages(range(100), passages, np.random.default_rng(seed))
        assert max(passage[-1] for passage in taken) < 39
        assert left[-60:] == list(range(40, 100))


def test_passages_may_take_a_whole_document() -> None:
    left, taken = take_passages(range(20), PassagesRecipe(tokens=8, count=2, margin=1), np.random.default_rng(0))
    assert (left, [passage[0] for passage in taken]) == ([], [1, 11])


def test_a_document_that_is_there_twice_is_found() -> None:
    draw = random.Random(0)
    first, other = ([draw.randrange(1000) for _ in range(300)] for _ in range(2))
    copy = [*first[50:], *other[:20]]  # cut and continued
    assert near_duplicates([first, other, copy, first]) == {2, 3}


def test_what_is_searched_and_what_calibrates_are_different_documents(recipe: RetrievalRecipe) -> None:
    tokenizer = load_encoder(recipe.model).tokenizer
    corpus = build_corpus(recipe.documents, recipe.passages, tokenizer)
    again = build_corpus(recipe.documents, recipe.passages, tokenizer)
    assert corpus.about == again.about
    assert corpus.about["documents"] == 7
    assert corpus.about["queries"] == 21
    assert corpus.owners.tolist() == [owner for owner in range(7) for _ in range(3)]
    assert len(corpus.calibration) == 4
    few = build_corpus(replace(recipe.documents, max_documents=3), recipe.passages, tokenizer)
    assert few.about["documents"] == 3
    other = build_corpus(replace(recipe.documents, seed=1), recipe.passages, tokenizer)
    assert other.about["digest"] != corpus.about["digest"]


# ---------------------------------------------------------------------------------------------------------------
# What a system reads
# ---------------------------------------------------------------------------------------------------------------


def read(recipe: RetrievalRecipe, document: list[int], length: int, **system: Any) -> list[list[int]]:
    """Pieces without their special tokens, of which each has one in front and one behind."""
    pieces = pieces_of(embedder_of(recipe, SystemRecipe(**system)), document, length)
    assert all((piece[0], piece[-1]) == (2, 3) for piece in pieces)
    return [piece[1:-1] for piece in pieces]


def test_each_system_reads_what_it_says(recipe: RetrievalRecipe) -> None:
    document = list(range(100, 400))
    room = LIMIT - 2
    assert read(recipe, document, 256, reads="truncated") == [document[:room]]
    assert read(recipe, document, 32, reads="truncated") == [document[:30]]
    assert read(recipe, document, 256, reads="head_tail") == [document[: room // 2] + document[-room // 2 :]]
    assert read(recipe, document[:40], 256, reads="head_tail") == [document[:40]]
    chunks = read(recipe, document, 256, reads="chunks")
    assert [token for chunk in chunks for token in chunk] == document[:254]
    assert [len(chunk) for chunk in chunks] == [62, 62, 62, 62, 6]
    overlapping = read(recipe, document, 256, reads="chunks", overlap=12)
    assert [chunk[0] for chunk in overlapping] == [100, 150, 200, 250, 300]
    assert overlapping[-1][-1] == document[253]
    assert read(recipe, document[:62], 256, reads="chunks", overlap=12) == [document[:62]]
    assert read(recipe, [], 256, reads="chunks") == [[]]
    with pytest.raises(RefusedError, match="cannot overlap by 62"):
        read(recipe, document, 256, reads="chunks", overlap=62)


def test_vectors_are_means_over_real_tokens(recipe: RetrievalRecipe) -> None:
    """Beside sentence-transformers' definition, one piece at a time, without padding."""
    embedder = embedder_of(recipe, SystemRecipe(reads="chunks"))
    draw = random.Random(1)
    documents = [[draw.randrange(4, 30) for _ in range(count)] for count in (10, 150, 70)]
    vectors = embed(embedder, documents, 256)
    model = AutoModel.from_pretrained(recipe.model).eval()
    for document, vector in zip(documents, vectors, strict=True):
        total = torch.zeros(vector.shape)
        for start in range(0, len(document), LIMIT - 2):
            ids = torch.tensor([[2, *document[start : start + LIMIT - 2], 3]])
            with torch.no_grad():
                mean = model(input_ids=ids).last_hidden_state[0].mean(0)
            total += ids.shape[1] * mean / mean.norm()
        torch.testing.assert_close(vector, total / total.norm(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["linear", "linformer", "bigbird"])
def test_a_conversion_leaves_the_checkpoint_as_it_is(variant: str, recipe: RetrievalRecipe) -> None:
    checkpoint = load_encoder(recipe.model)
    corpus = build_corpus(recipe.documents, recipe.passages, checkpoint.tokenizer)
    plain = Embedder(SystemRecipe(reads="truncated"), checkpoint, checkpoint.model, checkpoint.limit)
    before = embed(plain, corpus.documents, LIMIT)
    for extend in ("tile", "interpolate"):
        system = SystemRecipe(variant=variant, extend=extend)
        built = build_embedder(system, checkpoint, 256, batches_of(recipe), seed=0)
        assert embed(built, corpus.documents, 256).isfinite().all()
    assert torch.equal(embed(plain, corpus.documents, LIMIT), before)


def test_softmax_read_whole_is_the_checkpoint_within_its_limit(recipe: RetrievalRecipe) -> None:
    whole, plain = embedder_of(recipe, SystemRecipe(), 256), embedder_of(recipe, SystemRecipe(reads="truncated"))
    documents = [list(range(4, 30)), list(range(10, 20))]
    torch.testing.assert_close(embed(whole, documents, LIMIT), embed(plain, documents, LIMIT))


# ---------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------


def rows_of(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "rows.jsonl").read_text().splitlines()[1:]
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k and k != "peak_mb"} for line in lines]


def test_truncation_fails_where_documents_begin_alike_and_reading_all_succeeds(
    recipe: RetrievalRecipe, tmp_path: Path
) -> None:
    results = measure_retrieval(recipe, tmp_path / "out", command="test", say=silent)
    assert json.loads(json.dumps(results)) == results
    assert results["meta"]["unfinished"] is False
    long = {(row["system"], row["length"]): row for row in results["rows"] if row["kind"] == "long"}
    for length in (512, 256):
        assert long["truncated", length]["top1"]["mean"] == 0  # every document is the same to it
        assert long["truncated", length]["tokens_read"] == LIMIT
        assert "decoder" in long["past_only", length]["refused"]
    tails = (400 - 16) / 600  # passages that lie beyond the common beginning, about
    for name in ("softmax, longer table", "chunk and average", "longformer window_size=8", "linear"):
        row = long[name, 512]
        assert row["top1"]["mean"] > 0.8 * tails, name
        assert row["top1_less"]["truncated"]["low"] > 0
    assert "chunk and average" not in long["chunk and average", 512]["top1_less"]
    short = {row["system"]: row for row in results["rows"] if row["kind"] == "short"}
    assert short["checkpoint"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert short["softmax, longer table"]["cosine"] == pytest.approx(1, abs=1e-4)  # a longer table, the same vectors
    assert short["linear, interpolated, as published"]["cosine"] < 0.9999
    assert set(short["linear"]["top1_less"]) == {"checkpoint"}
    cost = {(row["system"], row["length"]): row for row in results["rows"] if row["kind"] == "cost"}
    assert all(cost[name, 512]["seconds"] > 0 for name in ("softmax, longer table", "truncated"))
    assert "refused" in cost["past_only", 512]

    text = render_retrieval(results)
    assert "21 passages of 16 tokens, 3 of each of 7 documents" in text
    assert "past_only (512 tokens): " in text
    assert "*truncated* finds 0.000; above it all 4 that read 512 tokens at a time." in verdict(results, 512)
    assert "*chunk and average* converts nothing" in verdict(results, 512)
    assert "| `truncated` | 64 | 0.000 [0.000, 0.000] |" in render_overview(results, 256)
    lines = render_headline(results, 512).splitlines()
    assert lines[-1].startswith("| `truncated` | 64 | 0.000")  # the worst one
    assert len(lines) == 2 + len(recipe.systems) - 1  # the refused one is not there
    draw_retrieval(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_a_run_that_was_cut_off_goes_on_to_the_same_rows(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, systems=recipe.systems[::3])
    whole = measure_retrieval(recipe, tmp_path / "whole", say=silent)
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "rows.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])  # half a line
    said: list[str] = []
    resumed = measure_retrieval(recipe, tmp_path / "cut", say=said.append)
    assert len(said) == len(lines) - 4 + 1  # and how long it took
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert [row.get("top1") for row in resumed["rows"]] == [row.get("top1") for row in whole["rows"]]
    said.clear()
    measure_retrieval(recipe, tmp_path / "cut", say=said.append)
    assert len(said) == 1
    measure_retrieval(recipe, tmp_path / "cut", fresh=True, say=said.append)
    assert len(said) == 1 + len(lines)


def test_a_system_or_a_length_more_measures_only_that(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, systems=recipe.systems[:3], cost_repeats=0)
    measure_retrieval(recipe, tmp_path, say=silent)
    said: list[str] = []
    grown = replace(recipe, systems=[*recipe.systems, SystemRecipe(variant="linear")], lengths=[512, 256, 128])
    measure_retrieval(grown, tmp_path, say=said.append)
    measured = [line.split(":")[0].split(maxsplit=2)[1:] for line in said[:-1]]
    assert measured == [
        ["512", "linear"],
        ["32", "linear"],
        ["256", "linear"],
        ["128", "chunk and average"],
        ["128", "linear"],
    ]
    other = replace(grown, systems=[SystemRecipe(variant={"linear": {"feature_map": "relu"}}, name="linear")])
    results = measure_retrieval(
        other, tmp_path, say=said.append
    )  # another method under the same name is not taken for it
    assert len([row for row in results["rows"] if row["kind"] == "long"]) == 3
    assert all(
        row["what"]["variant"] == {"linear": {"feature_map": "relu"}}
        for row in results["rows"]
        if row["system"] == "linear"
    )


def test_the_minutes_end_a_run(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    said: list[str] = []
    results = measure_retrieval(replace(recipe, minutes=1e-6), tmp_path, say=said.append)
    assert results["meta"]["unfinished"] is True
    assert results["rows"] == []
    assert "go on" in said[-1]
    assert "Not all is measured yet" in render_retrieval(results)


def test_lengths_that_were_not_reached_are_left_out(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, systems=recipe.systems[:3], cost_repeats=0)
    results = measure_retrieval(recipe, tmp_path, say=silent)
    assert measured_lengths(results) == [512, 256]
    late = [row for row in results["rows"] if row["length"] != 256 or row["system"] == "truncated"]
    assert measured_lengths({**results, "rows": late}) == [512]  # truncated is the same at every length
    fixed = [row for row in results["rows"] if row["system"] == "truncated"]
    assert measured_lengths({**results, "rows": fixed}) == [512]
    assert measured_lengths({**results, "rows": []}) == []
    lines = render_overview({**results, "rows": fixed}, 512).splitlines()
    assert len(lines) == 3  # systems without a row are left out


def test_a_system_that_fails_does_not_stop_the_others(
    recipe: RetrievalRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(recipe, systems=[recipe.systems[0], SystemRecipe(variant="linear")], lengths=[256])

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(get_variant("linear").module_class, "forward", broken)
        results = measure_retrieval(recipe, tmp_path, say=silent)
    failures = [(row["kind"], row["failure"]) for row in results["rows"] if "failure" in row]
    assert failures == [(kind, "RuntimeError: out of order") for kind in ("long", "short", "cost")]
    assert "linear (long, 256 tokens): RuntimeError: out of order" in render_retrieval(results)
    again = measure_retrieval(recipe, tmp_path, say=silent)
    assert not any("failure" in row for row in again["rows"])


def test_what_is_quadratic_is_left_out_of_long_documents(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    recipe = replace(recipe, systems=[SystemRecipe(), SystemRecipe(variant="entmax")], quadratic_up_to=256)
    results = measure_retrieval(recipe, tmp_path, say=silent)
    left = {(row["system"], row["length"]) for row in results["rows"] if "left_out" in row}
    assert left == {("softmax, longer table", 512), ("entmax", 512)}
    more = measure_retrieval(replace(recipe, quadratic_up_to=512), tmp_path, say=silent)
    assert not any("left_out" in row for row in more["rows"])


def test_a_saved_model_is_measured_as_what_it_was(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    """A folder that someone converted, or trained, beside the same conversion in memory."""
    options: dict[str, Any] = {"window_size": 8}
    for room in (512, 256):
        model = AutoModel.from_pretrained(recipe.model)
        convert_model(model, "longformer", max_length=room, **options).save_pretrained(tmp_path / f"saved{room}")
        AutoTokenizer.from_pretrained(recipe.model).save_pretrained(tmp_path / f"saved{room}")
    systems = [
        SystemRecipe(variant={"longformer": options}),
        SystemRecipe(model=str(tmp_path / "saved512")),
        SystemRecipe(model=str(tmp_path / "saved256")),
    ]
    recipe = replace(recipe, systems=systems, cost_repeats=0)
    results = measure_retrieval(recipe, tmp_path / "out", say=silent)
    rows = {(row["system"], row["length"]): row for row in rows_of(tmp_path / "out")}
    for length in (512, 256, 32):
        assert rows["saved512", length]["ranks"] == rows["longformer window_size=8", length]["ranks"]
    assert rows["saved256", 512]["refused"] == "reads 256 tokens at most"
    assert rows["saved256", 256]["ranks"] == rows["saved512", 256]["ranks"]
    measured = len((tmp_path / "out" / "rows.jsonl").read_text().splitlines())
    measure_retrieval(recipe, tmp_path / "out", say=silent)
    assert len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == measured
    os.utime(tmp_path / "saved512" / "model.safetensors", (0, 0))  # as if it was trained anew
    measure_retrieval(recipe, tmp_path / "out", say=silent)
    assert (
        len((tmp_path / "out" / "rows.jsonl").read_text().splitlines()) == measured + 3
    )  # two lengths, and short texts
    assert "saved256 (512 tokens): reads 256 tokens at most" in render_retrieval(results)


def test_a_saved_model_is_read_as_the_checkpoint_is(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    """The checkpoint saved again is the checkpoint; another one is a reference for the others; a converted one is read
    in the checkpoint's windows, which a window of attention as wide leaves as they are."""
    again, other, converted = (tmp_path / name for name in ("again", "other", "converted"))
    model = AutoModel.from_pretrained(recipe.model)
    model.save_pretrained(again)
    convert_model(AutoModel.from_pretrained(recipe.model), "longformer", max_length=512).save_pretrained(converted)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.mul_(3)
    model.save_pretrained(other)
    for folder in (again, other, converted):
        AutoTokenizer.from_pretrained(recipe.model).save_pretrained(folder)
    ways = [{"reads": "truncated"}, {"reads": "head_tail"}, {"reads": "chunks"}, {"reads": "chunks", "overlap": 8}]
    systems = [SystemRecipe(model=str(folder), **way) for folder in (again, other, converted) for way in ways]
    systems = [*systems, *(SystemRecipe(**way) for way in ways), SystemRecipe(variant="linear")]
    recipe = replace(recipe, systems=systems, lengths=[256, 512])
    results = measure_retrieval(recipe, tmp_path / "out", say=silent)
    rows = {(row["system"], row["length"]): row for row in rows_of(tmp_path / "out") if row["kind"] == "long"}
    for own in ("truncated", "head and tail", "chunk and average", "chunk and average, overlap 8"):
        for length in (256, 512) if "chunk" in own else (64,):
            wanted = rows[own, length]["gaps"]
            assert rows[f"again, {own}", length]["gaps"] == wanted
            assert rows[f"converted, {own}", length]["gaps"] == pytest.approx(wanted, abs=1e-4)
            assert own == "truncated" or rows[f"other, {own}", length]["gaps"] != wanted  # all begin alike
    linear = next(row for row in results["rows"] if (row["system"], row["kind"]) == ("linear", "long"))
    assert list(linear["top1_less"])[:3] == ["truncated", "chunk and average", "again, truncated"]
    assert "other, chunk and average" in linear["top1_less"]
    text = render_retrieval(results)
    assert "Measured as they were saved: `again, truncated`, " in text
    assert "nothing else is trained; calibrated" in text
    assert "top-1 less other, chunk and average" in text
    draw_retrieval(results, tmp_path / "saved.png")
    assert (tmp_path / "saved.png").stat().st_size > 10_000


def test_a_model_with_another_vocabulary_is_refused(recipe: RetrievalRecipe, tmp_path: Path) -> None:
    other = save_checkpoint(tmp_path / "other")
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("plum", "prune"))
    recipe = replace(recipe, systems=[SystemRecipe(model=str(other))], lengths=[256], cost_repeats=0)
    results = measure_retrieval(recipe, tmp_path / "out", say=silent)
    assert all(
        "is another than the checkpoint's" in row["refused"] for row in results["rows"] if row["system"] == "other"
    )
