# %% [markdown]
# # What is lost
#
# *Which part of softmax attention does a method give up, and where in the model does it matter?*
#
# Three looks at MiniLM on real documents: how many directions its attention matrices use, what the methods make of
# one of them, and how far each layer and head is from softmax attention. Then the one that counts: what is left at
# the end of the model. Half a minute on one CPU core.

# %%
import tempfile
from pathlib import Path

import matplotlib
import torch
from IPython.display import Image
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_linear_attn import convert_model, revert_model
from hf_linear_attn.analysis.pictures import draw_heads, draw_patterns, draw_spectrum
from hf_linear_attn.analysis.recordings import (
    build_layers,
    choose_start,
    document_batches,
    installed_layers,
    record_layers,
)
from hf_linear_attn.analysis.spectrum import attention_spectrum, effective_attention, softmax_weights
from hf_linear_attn.calibration import output_errors
from hf_linear_attn.data import load_documents, resolve_model
from hf_linear_attn.measure.style import COLORS, label_ends, new_figure, save_figure, style

torch.manual_seed(0)
logging.disable_progress_bar()
FOLDER = Path(tempfile.mkdtemp())
checkpoint = resolve_model("minilm")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModel.from_pretrained(checkpoint).eval()
task = load_documents("installed-sources", packages=["torch", "transformers", "sympy"], task="text")
calibration = document_batches(task.train["text"], tokenizer, length=384, count=2)
test = document_batches(task.test["text"], tokenizer, length=384, count=2)

# %% [markdown]
# ## Spectra: how much of an attention matrix is there to lose
#
# A matrix of n x n weights whose singular values fall fast is nearly one of few directions; that is what Linformer
# and Nystromformer live on. The share of all singular values that the largest quarter holds, by layer and head:

# %%
recordings = record_layers(model, test)  # what each layer's attention receives while the model runs softmax attention
curves = {layer: attention_spectrum(recording) for layer, recording in recordings.items()}
quarter = {layer: curve[:, curve.shape[1] // 4 - 1] for layer, curve in curves.items()}
for layer, shares in quarter.items():
    print(
        f"layer {layer}: the largest quarter holds {shares.mean():.0%} (heads {shares.min():.0%} to {shares.max():.0%})"
    )
draw_spectrum(
    curves,
    FOLDER / "spectrum.png",
    title="How many directions softmax attention uses",
    subtitle="MiniLM, 2 documents of 384 tokens",
)
Image(FOLDER / "spectrum.png", width=900)

# %% [markdown]
# ## Attention maps: what each method makes of one head
#
# Every method that is linear in its values mixes them with a matrix, written down or not. Here it is for one head, on
# the first 96 tokens of a document. `longformer` keeps the band and drops the rest; `linformer` sees slots that are
# shared by many keys; feature maps see every key, less sharply.

# %%
METHODS = {
    "longformer": {"window_size": 16},
    "hedgehog": {},
    "linear": {},
    "linformer": {"k": 16},
    "nystromformer": {"num_landmarks": 16},
}
LAYER, HEAD = 0, 5
first = record_layers(model, [{name: value[:, :96] for name, value in test[0].items()}], [LAYER])
chosen = record_layers(
    model, [{name: value[:, :96] for name, value in batch.items()} for batch in calibration], [LAYER]
)
inputs = first[LAYER].inputs[0]
matrices = {"softmax": softmax_weights(inputs)[0, HEAD]}
for method, options in METHODS.items():
    variant = build_layers(model, method, options, [LAYER])[LAYER]
    choose_start(variant, chosen[LAYER])
    matrices[method] = effective_attention(variant, inputs)[0, HEAD]
for name, matrix in matrices.items():
    distance = (matrix - matrices["softmax"]).norm() / matrices["softmax"].norm()
    print(f"{name:14s} distance of the matrix from softmax's: {distance:.2f}")
draw_patterns(
    matrices,
    FOLDER / "patterns.png",
    title="One head, six ways to mix 96 tokens",
    subtitle=f"MiniLM, layer {LAYER}, head {HEAD}, calibrated",
)
Image(FOLDER / "patterns.png", width=900)

# %% [markdown]
# ## Errors: which layer, which head
#
# Each layer alone, fed what the checkpoint feeds it: ‖output − softmax's output‖ / ‖softmax's output‖, on documents
# that were not calibrated on.

# %%
METHODS = {"longformer": {"window_size": 64}, "hedgehog": {}, "linear": {}, "linformer": {"k": 64}, "nystromformer": {}}


@torch.no_grad()
def states_after_layers(batch):
    return model(**batch, output_hidden_states=True).hidden_states


softmax_states = [states_after_layers(batch) for batch in test]
panels, drift, cosines = {}, {}, {}
for method, options in METHODS.items():
    convert_model(model, method, calibration=calibration, **options)
    installed = installed_layers(model)
    panels[method] = {layer: output_errors(installed[layer], recording) for layer, recording in recordings.items()}
    pairs = [(states_after_layers(batch), softmax) for batch, softmax in zip(test, softmax_states, strict=False)]
    drift[method] = [
        sum(float((x[depth] - y[depth]).norm() / y[depth].norm()) for x, y in pairs) / len(pairs) for depth in range(7)
    ]
    cosines[method] = sum(float(torch.cosine_similarity(x[-1].mean(1), y[-1].mean(1))) for x, y in pairs) / len(pairs)
    revert_model(model)
draw_heads(
    {method: panels[method] for method in ("longformer", "hedgehog")},
    FOLDER / "heads.png",
    title="What each head loses",
    subtitle="MiniLM, 2 documents of 384 tokens, calibrated on 2 others",
)
Image(FOLDER / "heads.png", width=900)

# %% [markdown]
# Over all 72 heads: does a head lose more, the more its attention is gathered in few directions?

# %%
shares = torch.cat(list(quarter.values()))
for method, errors in panels.items():
    losses = torch.tensor([loss for layer in errors.values() for loss in layer.head_errors])
    print(f"{method:14s} correlation of error and share: {torch.corrcoef(torch.stack([losses, shares]))[0, 1]:+.2f}")

# %% [markdown]
# ## At the end: errors add up, and partly cancel
#
# In a converted model a layer is fed what the converted layers below made. How far the hidden states are from the
# checkpoint's after each layer, and the cosine between the vectors of a document that the two models end with:

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        8,
        4.4,
        "How far the states drift from the checkpoint's",
        "MiniLM, all 6 layers converted, calibrated, not trained; beside each: cosine of the documents' vectors",
    )
    axes = figure.subplots()
    for color, distances in zip(COLORS, drift.values(), strict=False):
        axes.plot(range(7), distances, color=color, marker="o", markersize=5, linewidth=2)
    axes.set_xlim(-0.1, 8)
    axes.set_ylim(0, None)
    axes.set_xticks(range(7), ["embeddings", *range(6)])
    axes.set_xlabel("after layer")
    axes.set_ylabel("relative distance of the states")
    axes.grid(axis="y")
    ends = [(f"{m}: {cosines[m]:.3f}", 6, drift[m][-1], color) for color, m in zip(COLORS, drift, strict=False)]
    label_ends(axes, ends)
    save_figure(figure, FOLDER / "drift.png")
for method, cosine in cosines.items():
    mean = sum(error.error for error in panels[method].values()) / len(panels[method])
    print(
        f"{method:14s} mean error of a layer {mean:.2f}, states in the end {drift[method][-1]:.2f}, cosine {cosine:.3f}"
    )
Image(FOLDER / "drift.png", width=760)

# %% [markdown]
# ## The answer
#
# What is lost differs in kind. A window loses heads that look everywhere, and those use few directions; feature maps
# lose heads that are sharp, and those use many: the correlations above have opposite signs. So no method is the best
# in all heads, and which layers to leave on softmax (`layers="auto"`) depends on the method. An error of one layer is
# not the error of the model, which is why the last picture is the one to look at before training, and
# [03](03_long_documents.ipynb) the one after. On your model and your documents: `hf-linear-attn analyze` and
# `hf-linear-attn report`.
