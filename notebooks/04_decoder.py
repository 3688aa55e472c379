# %% [markdown]
# # Uptrain a decoder, and generate with constant memory
#
# *What does a language model lose when it is converted, what does uptraining bring back, and what does it keep per
# token?*
#
# Small enough to see it all: a Llama of two layers learns a text by heart, letter by letter, with softmax attention;
# it is converted, uptrained, and continues the text. Then the memory that generation takes. Half a minute on one CPU
# core; what SmolLM2 keeps of its quality after each stage, with intervals, is in
# [docs/results.md](../docs/results.md#a-language-model-stage-by-stage).

# %%
import tempfile
from functools import partial
from pathlib import Path

import matplotlib
import torch
from IPython.display import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainingArguments,
)
from transformers.utils import logging

from hf_linear_attn import convert_model
from hf_linear_attn.measure.style import COLORS, GRAY, label_ends, new_figure, plain_numbers, save_figure, style
from hf_linear_attn.training import UptrainTrainer

torch.manual_seed(0)
logging.disable_progress_bar()
FOLDER = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A decoder that knows a text
#
# `UptrainTrainer` is a thin subclass of `transformers.Trainer`; it trains models that are not converted as well.

# %%
TEXT = (
    "Attention reads every token for every token. A feature map turns the product around: keys and values are summed "
    "once, each query reads the sum, and what is summed has one size. "
)
letters = sorted(set(TEXT))
inner = Tokenizer(
    models.WordLevel({letter: number for number, letter in enumerate(["<pad>", *letters])}, unk_token="<pad>")
)
inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
inner.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<pad>")
texts = [TEXT * 8] * 8
SPAN = 64  # letters that it is trained on at a time
config = LlamaConfig(
    vocab_size=len(letters) + 1, hidden_size=96, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=8192, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)


def train(trainer, steps, rate):
    arguments = TrainingArguments(
        str(FOLDER), max_steps=steps, learning_rate=rate, per_device_train_batch_size=8, lr_scheduler_type="linear",
        warmup_steps=10, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    made = trainer(model, arguments, train_dataset=texts, processing_class=tokenizer, max_length=SPAN)
    made.remove_callback(PrinterCallback)
    made.train()


ids = tokenizer(TEXT * 32, return_tensors="pt")["input_ids"]  # [1, 5664]


@torch.no_grad()
def loss():
    spans = ids[0, : 16 * SPAN].view(16, SPAN)
    return model.eval()(spans, labels=spans).loss.item()


def written():
    prompt = ids[:, : SPAN // 2]
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": SPAN // 2, "do_sample": False}
    return tokenizer.decode(model.generate(prompt, **options)[0, SPAN // 2 :])


stages = {}
train(partial(UptrainTrainer, packing=False), 150, 1e-2)
stages["softmax"] = loss(), written()
print("loss {:.3f}: {}".format(*stages["softmax"]))

# %% [markdown]
# ## Convert, uptrain
#
# `hedgehog` has feature maps that learn to spike as softmax does, and a state of constant size. Calibrated, it is a
# start; `UptrainTrainer` then trains all of it on the next letter, as before. For larger models other stages come
# between, in which the new parameters learn alone: `hf_linear_attn.training.TransferTrainer`, `DistillTrainer`.

# %%
convert_model(model, "hedgehog", calibration=[{"input_ids": ids[:, : 4 * SPAN].view(4, SPAN)}])
stages["converted"] = loss(), written()
train(partial(UptrainTrainer, packing=False), 80, 3e-3)
stages["uptrained"] = loss(), written()
print("the text goes on:       ", TEXT[SPAN // 2 : SPAN])
for stage, (value, text) in stages.items():
    print(f"{stage:10s} loss {value:.3f}: {text}")
assert stages["uptrained"][0] < stages["converted"][0]

# %% [markdown]
# ## What generation keeps
#
# Softmax attention keeps the keys and values of every token; the converted model a matrix and a vector for each head
# and layer. Counted, after reading so many letters:


# %%
@torch.no_grad()
def kept(attention, length):
    """Bytes of the cache after so many letters."""
    model.set_attn_implementation(attention)
    outputs = model(ids[:, :length], use_cache=True)
    model.set_attn_implementation("linear_attn")
    cache = outputs["cache" if "cache" in outputs else "past_key_values"]  # renamed in Transformers 5.24
    tensors = [tensor for layer in cache.layers for tensor in held(layer)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held(layer):
    """Tensors of one layer: a state, or keys and values."""
    return layer.state.values() if hasattr(layer, "state") else (layer.keys, layer.values)


LENGTHS = (64, 256, 1024, 4096)
ATTENTION = {"softmax": "sdpa", "hedgehog": "linear_attn"}
sizes = {name: {length: kept(key, length) for length in LENGTHS} for name, key in ATTENTION.items()}
for name, found in sizes.items():
    print(f"{name:10s}", ", ".join(f"{length:,} tokens: {count / 1024:,.0f} KiB" for length, count in found.items()))
assert len(set(sizes["hedgehog"].values())) == 1

# %%
with matplotlib.rc_context(style()):
    figure = new_figure(
        11, 4.2, "A state instead of a cache", "a Llama of 2 layers, hedgehog; losses per letter on the text it knew"
    )
    left, right = figure.subplots(1, 2)
    names = list(stages)
    values = [stages[name][0] for name in names]
    left.bar(names, values, color=[GRAY, *COLORS[:2]], width=0.6)
    for name, value in zip(names, values, strict=True):
        left.annotate(f"{value:.2f}", (name, value), xytext=(0, 4), textcoords="offset points", ha="center")
    left.set_ylim(0, 1.12 * max(values))
    left.set_ylabel("loss")
    left.set_title("What it knows after each stage", loc="left", fontsize=11)
    for found, color in zip(sizes.values(), (GRAY, COLORS[0]), strict=True):
        right.plot(found.keys(), [count / 1024 for count in found.values()], color=color, marker="o", linewidth=2)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlim(50, 30000)
    right.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    right.minorticks_off()
    plain_numbers(right.yaxis)
    right.set_xlabel("tokens read")
    right.set_ylabel("KiB kept for a sequence")
    right.set_title("What generation keeps", loc="left", fontsize=11)
    right.grid()
    ends = [
        (name, LENGTHS[-1], found[LENGTHS[-1]] / 1024, color)
        for (name, found), color in zip(sizes.items(), (GRAY, COLORS[0]), strict=True)
    ]
    label_ends(right, ends)
    save_figure(figure, FOLDER / "decoder.png")
Image(FOLDER / "decoder.png", width=960)

# %% [markdown]
# ## The same text with and without the state
#
# Token by token from the state, or the whole text anew for each token: greedy generation is the same.

# %%
prompt = ids[:, : SPAN // 2]
options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": SPAN // 2, "do_sample": False}
assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))

# %% [markdown]
# ## The answer
#
# Converted, the model has forgotten most of what it knew, though none of its weights changed: its layers receive
# something else than they were trained for. A few steps on its own text bring it back. What generation keeps is one
# size from the first token to the last; whether a state of that size is enough for what has to be remembered is the
# question to ask of your task, and of the pass keys in the results.
