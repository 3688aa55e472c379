# %% [markdown]
# # Push and pull
#
# *What goes to the Hub, and what does somebody who has never heard of this package get back?*
#
# A converted model with a card, pushed in one commit, pulled in a fresh process, private, pinned, renewed. The Hub is
# a small server on this machine, the one of the test-suite: nothing leaves it, no account is needed. Half a minute on
# one CPU core.

# %%
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path.cwd().parent  # of the clone: the notebook lies in its notebooks/
FOLDER = Path(tempfile.mkdtemp())
sys.path.insert(0, str(ROOT))
from tests.hub_server import run_hub_server

server = run_hub_server({"hf_mine": "me", "hf_yours": "you"})  # tokens, and whose they are
hub = server.__enter__()
os.environ |= hub.environment(FOLDER / "home", token="hf_mine")  # before anything imports huggingface_hub

# %% [markdown]
# With the real Hub, leave that cell out and log in once: `hf auth login`. Everything below stays as it is.

# %%
import torch
from huggingface_hub import HfApi, ModelCard
from IPython.display import Markdown
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_linear_attn import convert_model
from hf_linear_attn.analysis.recordings import document_batches
from hf_linear_attn.data import load_documents, resolve_model

logging.disable_progress_bar()
checkpoint = resolve_model("minilm")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModel.from_pretrained(checkpoint).eval()
texts = load_documents("installed-sources", packages=["torch", "transformers"], task="text").train["text"]
calibration = document_batches(texts, tokenizer, length=256, count=2)
convert_model(model, "longformer", window_size=64, max_length=2048, calibration=calibration)
tokenizer.model_max_length = model.conversion_report.tokenizer_max_length

# %% [markdown]
# ## Push
#
# Saved like any model, pushed as a folder: `hf-linear-attn push FOLDER you/your-model` is the same on the command
# line.

# %%
model.save_pretrained(FOLDER / "model")
tokenizer.save_pretrained(FOLDER / "model")
about = {"base_model": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"}
commit = model.push_to_hub("me/long-minilm", folder=FOLDER / "model", **about)
api = HfApi()
for file in api.list_repo_tree("me/long-minilm"):
    print(f"{file.size:12,}  {file.path}")

# %% [markdown]
# ## The card
#
# Read off the model and its report, nothing typed; what was not measured is called so.

# %%
card = ModelCard.load("me/long-minilm")
print(card.data.to_yaml())
Markdown("\n## ".join(card.text.split("\n## ")[:2]))  # its beginning

# %% [markdown]
# ## Pull, in a process that does not know the package
#
# `trust_remote_code=True` lets Transformers run the repository's loader, a few lines that import this package: it has
# to be installed, not imported. A process that has imported it needs no trust.

# %%
PULL = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained("me/long-minilm", trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.arange(1000, 1900)[None]).last_hidden_state, sys.argv[1])
print(type(model).__name__, "reads", model.config.max_position_embeddings, "tokens")
"""
done = subprocess.run(
    [sys.executable, "-c", PULL, str(FOLDER / "states.pt")], capture_output=True, text=True, check=True
)
print(done.stdout)
with torch.no_grad():
    states = model(torch.arange(1000, 1900)[None]).last_hidden_state
assert torch.equal(torch.load(FOLDER / "states.pt"), states)
print("the same states, bit for bit")

# %% [markdown]
# ## Pin, renew, keep private
#
# A revision stays what it was. The card can be renewed alone: the weights are not uploaded again. What you write into
# a card yourself stays, if you remove the comment that says it was generated. A private repository needs its owner's
# token.

# %%
# A card of your own from here on: no generated-by comment.
mine = (
    "\n".join(line for line in card.content.splitlines() if not line.startswith("<!--"))
    + "\n\n## Notes\n\nRead me first.\n"
)
api.upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id="me/long-minilm")
before = len(hub.requests)
model.push_to_hub("me/long-minilm", folder=FOLDER / "model", card_only=True, **about)
uploads = [request for request in hub.requests[before:] if "lfs" in request]
assert "Read me first." in ModelCard.load("me/long-minilm").content
assert not uploads
print("renewed without an upload of weights; the note is still there")

pinned = AutoModel.from_pretrained("me/long-minilm", revision=commit.oid)
print("pinned to", commit.oid[:8], "of", len(hub.repos["me/long-minilm"].branches["main"]), "commits")

model.push_to_hub("me/secret", folder=FOLDER / "model", private=True, **about)
try:
    AutoModel.from_pretrained("me/secret", token="hf_yours")
except OSError as refusal:
    print("somebody else gets:", str(refusal).splitlines()[0])

# %%
server.__exit__(None, None, None)

# %% [markdown]
# ## The answer
#
# A folder that opens like any other model, with a page that says what was changed and what that cost, and nothing
# that has to be explained. What belongs to it beside the weights is in the list above; with `--card-from
# results.json` the card has the measurements of `hf-linear-attn compare` too.
