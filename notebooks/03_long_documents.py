# %% [markdown]
# # Long documents: fine-tune and compare
#
# *What does a classifier gain when it may read past its checkpoint's limit?*
#
# `hf-linear-attn compare`, called from Python: a checkpoint truncated to its limit, and the same one converted to
# read on, under one budget, beside bags of words. To be done in less than a minute of one CPU core, everything is
# small: the checkpoint is the first three layers of MiniLM with the first 128 of its 512 positions, and the documents
# are made so that the answer is known, with a preface of another package in front, so that what tells the label
# begins behind that limit.

# %%
import json
import logging
import tempfile
from pathlib import Path

from IPython.display import Image
from transformers import AutoModel, AutoTokenizer

from hf_linear_attn.compare.run import compare
from hf_linear_attn.data import load_documents, resolve_model
from hf_linear_attn.measure.markdown import markdown_table
from hf_linear_attn.training.recipe import Recipe

logging.getLogger("hf_linear_attn").setLevel(logging.ERROR)
FOLDER = Path(tempfile.mkdtemp())
tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))

LIMIT = 128
short = AutoModel.from_pretrained(resolve_model("minilm"), num_hidden_layers=3)
table = short.embeddings.position_embeddings
table.weight.data, table.num_embeddings = table.weight.data[:LIMIT].clone(), LIMIT
short.config.max_position_embeddings = LIMIT
short.save_pretrained(FOLDER / "short")
tokenizer.model_max_length = LIMIT
tokenizer.save_pretrained(FOLDER / "short")

# %% [markdown]
# ## A task that needs the second half
#
# 126 tokens of a file of NumPy or PyTorch, then 128 of one of two other packages, to be told apart. Written as JSONL,
# as yours would be: one document a line, `text` and `label`.

# %%
PACKAGES = ["sympy", "transformers"]


def tokens(text, count):
    ids = tokenizer(text, truncation=True, max_length=count, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids)


task = load_documents("installed-sources", packages=PACKAGES, max_train_documents=96, max_test_documents=24)
prefaces = load_documents("installed-sources", packages=["numpy", "torch"], task="text").train["text"]
files = {}
for part, documents in (("train", task.train), ("test", task.test)):
    files[part] = str(FOLDER / f"{part}.jsonl")
    with open(files[part], "w", encoding="utf-8") as lines:
        for number, row in enumerate(documents):
            preface = prefaces[(number + (0 if part == "train" else len(task.train))) % len(prefaces)]
            text = tokens(preface, LIMIT - 2) + "\n" + tokens(row["text"], LIMIT)
            lines.write(json.dumps({"text": text, "label": PACKAGES[row["label"]]}) + "\n")
print(f"{len(task.train)} documents to train on, {len(task.test)} to test on")

# %% [markdown]
# ## One recipe, two readers
#
# The recipe is what `hf-linear-attn train` and `compare` read from YAML. The last layer and the head learn; the
# layers below run once per document.

# %%
recipe = Recipe.from_dict(
    {
        "model": {"name": str(FOLDER / "short"), "kwargs": {"attention_probs_dropout_prob": 0.0}},
        "data": {"source": files},
        "training": {
            "output_dir": str(FOLDER / "compare"),
            "num_train_epochs": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
        },
        "stages": [
            {
                "stage": "finetune",
                "trainable": "last_layers:1",
                "cache_frozen_layers": True,
                "head_learning_rate": 3e-3,
                "max_length": 2 * LIMIT,
            }
        ],
        "evaluation": {
            "metrics": ["accuracy"],
            "variants": [{"longformer": {"window_size": 64}}],
            "softmax_long": False,
            "bag_of_words": True,
            "forward_lengths": [LIMIT // 2, LIMIT, 2 * LIMIT],
            "forward_repeats": 1,
        },
    }
)
results = compare(recipe, title="Where the answer begins behind the limit", show_progress=False).results

# %%
paths = {path.name: path for path in (FOLDER / "compare").iterdir()}
rows = [
    [
        row["name"],
        f"{row['max_length']:,}",
        f"{row['quality']['accuracy']['mean']:.2f}",
        f"{row['train_seconds']:.0f} s",
    ]
    for row in results["rows"]
]
rows += [[baseline["name"], "", f"{baseline['value']:.2f}", ""] for baseline in results["baselines"]]
print(markdown_table(["model", "tokens read", "accuracy", "training"], rows))
Image(paths["report.png"], width=900)

# %%
accuracy = {row["name"]: row["quality"]["accuracy"] for row in results["rows"]}
for name, found in accuracy.items():
    print(f"{name:20s} {found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")
assert accuracy["longformer"]["mean"] > accuracy["softmax-truncated"]["mean"]

# %% [markdown]
# ## The answer
#
# Cut before the answer, no attention helps: the truncated model can but guess, and so does the bag of words of the
# same tokens. The converted one reads on and finds it. `softmax_long: True` adds a row for softmax attention over all
# tokens, which says whether it is the method or the reading, and takes a while longer.
#
# That was made to be so. On whole State of the Union addresses, where the beginning tells much, and a bag of words
# even more, see the first table of the [README](../README.md); on your own documents, run `hf-linear-attn compare
# RECIPE --set data.source=yours.jsonl`, and look at the rows without a model first.
