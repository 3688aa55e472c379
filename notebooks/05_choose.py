# %% [markdown]
# # Choose a method
#
# *What does each method cost, what does it start with, and what does it come back to when it is trained?*
#
# Nothing is run here: the numbers are those of the result files that this repository holds, each written by the
# command in its `meta`. `hf-linear-attn advise MODEL --length N` measures the same on your machine and your
# documents.

# %%
import json
import statistics
import tempfile
from pathlib import Path

import matplotlib
from IPython.display import Image

from hf_linear_attn.measure.style import (
    COLORS,
    GRAY,
    INK,
    MARKERS,
    label_ends,
    new_figure,
    plain_numbers,
    save_figure,
    style,
)
from hf_linear_attn.registry import KINDS, get_variant

FOLDER = Path(tempfile.mkdtemp())
RECIPES = Path("../recipes")


def committed(name):
    return json.loads((RECIPES / name).read_text(encoding="utf-8"))


# %% [markdown]
# ## Before training: error against cost
#
# For each method and length, the time of a layer's forward over that of `scaled_dot_product_attention`, and the error
# of its attention output against softmax's, calibrated where calibration is possible. A point on the line is beaten
# by none in both.

# %%
methods = committed("methods/results/methods.json")
print(methods["meta"]["command"])


def points(model, length):
    """method -> (time over softmax's, error of the start)."""
    errors, found = {}, {}
    for row in methods["rows"]:
        if (row["model"], row["length"]) != (model, length):
            continue
        if row["kind"] == "start" and (row.get("calibrated") or row.get("published")):
            errors.setdefault(row["method"], []).append((row.get("calibrated") or row["published"])["error"])
        if row["kind"] == "cost" and "ratio" in row:
            found[row["method"]] = (1 / row["ratio"], row["key"])
    return {m: (cost, statistics.fmean(errors[m]), key) for m, (cost, key) in found.items() if m in errors}


def unbeaten(found):
    """Names, from cheap to close."""
    line, best = [], float("inf")
    for name, (_, error, *_) in sorted(found.items(), key=lambda item: item[1][:2]):
        if error < best:
            line.append(name)
            best = error
    return line


PLACES = (("minilm", 512), ("minilm", 2048), ("smollm2", 2048))
fronts = {}
with matplotlib.rc_context(style()):
    figure = new_figure(
        13, 5, "Quality of the start against cost: the longer the text, the more pays",
        "calibrated starts; time of a layer's forward over softmax attention's, on a CPU",
    )  # fmt: skip
    for axes, place in zip(figure.subplots(1, 3, sharey=True), PLACES, strict=True):
        found = points(*place)
        fronts[place] = unbeaten(found)
        for kind, color, marker in zip(KINDS, COLORS, MARKERS, strict=False):
            mine = [(cost, error) for cost, error, key in found.values() if get_variant(key).guide[0] == kind]
            axes.scatter(
                *zip(*mine, strict=True) if mine else ([], []), color=color, marker=marker, s=42, label=kind, zorder=3
            )
        axes.plot(*zip(*(found[name][:2] for name in fronts[place]), strict=True), color=INK, linewidth=1, zorder=2)
        axes.axvline(1, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xscale("log")
        axes.set_ylim(-0.05, 1.05)
        axes.set_title("{}, {:,} tokens".format(*place), loc="left", fontsize=11)
        axes.set_xlabel("time over softmax's")
        axes.grid()
        plain_numbers(axes.xaxis)
        for number, name in enumerate(fronts[place], start=1):
            axes.annotate(str(number), found[name][:2], xytext=(-8, -11), textcoords="offset points", fontsize=8.5)
        beside = "\n".join(f"{number}  {name.split()[0]}" for number, name in enumerate(fronts[place], start=1))
        axes.text(0.72, 0.98, beside, transform=axes.transAxes, va="top", fontsize=9, linespacing=1.4)
        axes.label_outer()
    figure.axes[0].set_ylabel("error of the start against softmax")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save_figure(figure, FOLDER / "front.png")
for place, names in fronts.items():
    print("{}, {:,} tokens, from cheap to close: ".format(*place) + ", ".join(names))
Image(FOLDER / "front.png", width=1000)

# %% [markdown]
# ## After training: what comes back
#
# The start is not the end. SmolLM2, converted and trained in stages; its perplexity over that of the checkpoint
# trained on the same tokens, 1 being as good.

# %%
language = committed("smollm2/results/language.json")
print(language["meta"]["command"].partition(" --set")[0])
STAGES = ("converted", "transfer", "distill")
LENGTH = 2048
curves = {}
for row in language["rows"]:
    if row.get("length") == LENGTH and row["stage"] in STAGES and "linear branch off" not in row["system"]:
        curves.setdefault(row["system"], {})[row["stage"]] = row["ratio"]
trained = {name: stages for name, stages in curves.items() if "distill" in stages}
for name, stages in trained.items():
    print(f"{name:36s} " + ", ".join(f"{stage} {ratio['mean']:.2f}" for stage, ratio in stages.items()))

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        8.4, 4.4, "Training brings most of it back, if the start was close",
        f"SmolLM2, {LENGTH:,} tokens, over the perplexity of the checkpoint trained on the same tokens; 95% intervals",
    )  # fmt: skip
    axes = figure.subplots()
    for stages, color in zip(trained.values(), COLORS, strict=False):
        places = [STAGES.index(stage) for stage in stages]
        means = [ratio["mean"] for ratio in stages.values()]
        spread = [[r["mean"] - r["low"] for r in stages.values()], [r["high"] - r["mean"] for r in stages.values()]]
        axes.errorbar(places, means, yerr=spread, color=color, marker="o", linewidth=2, capsize=3)
    axes.axhline(1, color=GRAY, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    axes.set_xticks(range(3), STAGES)
    axes.set_xlim(-0.1, 4.2)
    axes.set_ylabel("perplexity over softmax's")
    axes.grid(axis="y")
    ends = [(f"{n.replace(',tail=centroids', '')}: {s['distill']['mean']:.2f}", 2, s["distill"]["mean"], c)
            for (n, s), c in zip(trained.items(), COLORS, strict=False)]  # fmt: skip
    label_ends(axes, ends)
    save_figure(figure, FOLDER / "stages.png")
Image(FOLDER / "stages.png", width=800)

# %% [markdown]
# ## Without training: long documents as vectors
#
# How often a passage finds the rest of its document among the others, against what a document takes. The rival is no
# method but a habit: cut the document, average the vectors.

# %%
embedders = committed("minilm/results/embedder/retrieval.json")
print(embedders["meta"]["command"])
at = {
    kind: {r["system"]: r for r in embedders["rows"] if (r["kind"], r["length"]) == (kind, 4096)}
    for kind in ("long", "cost")
}
found = {
    name: (at["cost"][name]["seconds"], row["top1"])
    for name, row in at["long"].items()
    if "top1" in row and "as published" not in name and "seconds" in at["cost"].get(name, {})
}
for name, (seconds, top1) in sorted(found.items(), key=lambda item: -item[1][1]["mean"]):
    print(f"{name:32s} top-1 {top1['mean']:.3f} [{top1['low']:.3f}, {top1['high']:.3f}], {seconds:.2f} s a document")

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        8.4, 5.2, "Reading more finds more; chunks are hard to beat",
        "MiniLM, nothing trained, 4,096 tokens of each address; 95% intervals over groups; gray: nothing converted",
    )  # fmt: skip
    axes = figure.subplots()
    ranked = sorted(found.items(), key=lambda item: item[1][1]["mean"])
    for height, (name, (seconds, top1)) in enumerate(ranked):
        color = GRAY if "chunk" in name or name in ("truncated", "head and tail") else COLORS[0]
        axes.plot([top1["low"], top1["high"]], [height, height], color=color, alpha=0.35, linewidth=3)
        axes.scatter(top1["mean"], height, color=color, s=45, zorder=3)
        axes.annotate(f"{seconds:.2f} s", (0.56, height), va="center", ha="right", color=GRAY, fontsize=9)
    axes.set_yticks(range(len(ranked)), [name for name, _ in ranked])
    axes.set_xlim(0, 0.56)
    axes.set_xlabel("passages that find their document first; right: seconds a document")
    axes.grid(axis="x")
    save_figure(figure, FOLDER / "embedders.png")
Image(FOLDER / "embedders.png", width=800)

# %% [markdown]
# ## The answer
#
# - At 512 tokens hardly anything is gained; leave the model alone, unless a state of constant size is what you want.
# - No time to train: a method on the line of the first picture, at your length; on a decoder, one with a window. For
#   vectors of long documents try the mean of chunks first.
# - Time to train: the methods with a window come back nearly whole after a few tens of thousands of tokens here;
#   feature maps do not in that time, even with 8 of 30 layers left on softmax, and they are what keeps generation
#   constant.
#
# The same by hand, for each length, device and pass: the results explorer of the documentation (`make docs`).
