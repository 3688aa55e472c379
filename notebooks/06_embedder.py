# %% [markdown]
# # A long-document embedder with sentence-transformers
#
# *What does an embedder see of the end of a document, and what does conversion change?*
#
# A `SentenceTransformer` reads what its `max_seq_length` says and drops the rest without a word. Here its transformer
# is converted in place, nothing trained, and passages from the ends of documents look for the documents they are
# from. Needs sentence-transformers, which is in the extra `[conformance]`: `make test-conformance` runs this
# notebook.

# %%
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from IPython.display import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers.utils import logging

from hf_linear_attn import convert_model
from hf_linear_attn.analysis.recordings import document_batches
from hf_linear_attn.data import load_documents, resolve_model
from hf_linear_attn.measure.style import COLORS, GRAY, new_figure, save_figure, style

torch.manual_seed(0)
logging.disable_progress_bar()
FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The embedder, and documents longer than it reads
#
# The package of the checkpoint has its weights alone; with a hub, `SentenceTransformer("all-MiniLM-L6-v2")` has the
# pooling as well. Of each document, a source file of an installed package, the first 1,152 tokens are searched; the
# query is 128 tokens of it from behind the 768th, which are taken out: no document holds its query.

# %%
transformer = Transformer(resolve_model("minilm"), max_seq_length=512)
embedder = SentenceTransformer(
    modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()], device="cpu"
)
tokenizer = transformer.tokenizer
task = load_documents("installed-sources", packages=["torch", "transformers", "sympy", "networkx"], task="text")
cut = [
    tokenizer(text, truncation=True, max_length=1280, add_special_tokens=False)["input_ids"]
    for text in task.test["text"]
]
cut = [ids for ids in cut if len(ids) == 1280][:24]
documents = [tokenizer.decode(ids[:768] + ids[896:]) for ids in cut]
queries = [tokenizer.decode(ids[776:888]) for ids in cut]
print(f"{len(documents)} documents; the embedder reads {embedder.max_seq_length} tokens")

# %% [markdown]
# ## Truncated, in chunks, converted
#
# The habit is to cut and average. The conversion takes the transformer inside and raises the limit; pooling,
# normalization and `encode` stay as they are.


# %%
def search(encode):
    """Share of queries that find their document first, mean reciprocal rank, processor seconds a document."""
    start = time.process_time()
    vectors = torch.stack([encode(document) for document in documents])
    seconds = (time.process_time() - start) / len(documents)
    asked = torch.stack([embedder.encode(query, convert_to_tensor=True) for query in queries])
    scores = asked @ vectors.T
    ranks = 1 + (scores > scores.diag()[:, None]).sum(1)
    return (ranks == 1).float().mean().item(), (1 / ranks).mean().item(), seconds


def whole(document):
    return embedder.encode(document, convert_to_tensor=True)


def chunks(document):
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    pieces = [tokenizer.decode(ids[start : start + 510]) for start in range(0, len(ids), 510)]
    weights = torch.tensor([float(len(ids[start : start + 510])) for start in range(0, len(ids), 510)])
    mean = (weights[:, None] * embedder.encode(pieces, convert_to_tensor=True)).sum(0)
    return mean / mean.norm()


found = {"truncated at 512": search(whole), "chunk and average": search(chunks)}

calibration = document_batches(task.train["text"], tokenizer, length=512, count=2)
convert_model(embedder[0].auto_model, "longformer", window_size=256, max_length=2048, calibration=calibration)
embedder.max_seq_length = 2048
found["longformer, whole"] = search(whole)
for name, (top1, mrr, seconds) in found.items():
    print(f"{name:20s} top-1 {top1:.2f}, mean reciprocal rank {mrr:.2f}, {seconds:.2f} s a document")

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        8,
        3.2,
        "Who finds the end of a document",
        f"{len(documents)} documents of 1,152 tokens, queries from behind token 768",
    )
    axes = figure.subplots()
    for height, (name, (top1, *_)) in enumerate(reversed(found.items())):
        color = COLORS[0] if "whole" in name else GRAY
        axes.barh(height, top1, color=color, height=0.55)
        axes.annotate(f"{top1:.2f}", (top1, height), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(found)), reversed(found))
    axes.set_xlim(0, 1)
    axes.set_xlabel("queries that find their document first")
    save_figure(figure, FOLDER / "found.png")
Image(FOLDER / "found.png", width=760)

# %% [markdown]
# ## Save, reload
#
# As any SentenceTransformer, in any process that imports `hf_linear_attn`.

# %%
embedder.save(str(FOLDER / "embedder"))
again = SentenceTransformer(str(FOLDER / "embedder"), device="cpu")
assert again.max_seq_length == 2048
assert torch.equal(
    again.encode(queries[0], convert_to_tensor=True), embedder.encode(queries[0], convert_to_tensor=True)
)
print([type(module).__name__ for module in again], type(again[0].auto_model).__name__)

# %% [markdown]
# ## The answer
#
# What stands behind the limit is lost to a truncated embedder, and both chunks and a converted model bring it back,
# without training. Which of the two is better is not told by so few documents: `hf-linear-attn retrieval` has
# intervals, and its results on speeches of 4,096 tokens are in the
# [results](../docs/results.md#long-documents-as-vectors). Trained to the end: `recipes/minilm/long_embedder.yaml`.
