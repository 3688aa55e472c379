"""What a user can mistype: every command ends with one sentence, an exit status, and nothing written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from hf_linear_attn.cli import app
from tests.small_runs import save_checkpoint, save_documents
from tests.tiny import base_model

runner = CliRunner(env={"COLUMNS": "200"})
ROOT = Path(__file__).parents[1]
TRAIN = (
    "model: {name: model}\ndata: {source: documents}\nstages: [{stage: finetune}]\n"
    "training: {num_train_epochs: 1, output_dir: out}\n"
)
BENCH = "title: t\nlayers: [{name: a, lengths: [8], hidden_size: 16, num_heads: 2, variants: [linear]}]\n"
METHODS = (
    "models: [{name: model, lengths: [16]}]\nmethods: [linear]\n"
    "documents: {source: documents, calibration_tokens: 16, test_tokens: 16}\n"
)
RETRIEVAL = (
    "model: model\nsystems: [{variant: linear}]\nlengths: [64]\nshort_lengths: []\n"
    "documents: {source: documents, min_tokens: 16}\npassages: {tokens: 4, count: 1, margin: 0}\n"
    "calibration: {documents: 1, tokens: 16}\n"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, documents, recipes, and broken copies of each."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint(folder / "model")
    save_checkpoint(folder / "headless")
    base_model("bert", max_position_embeddings=64).save_pretrained(folder / "headless")
    save_checkpoint(folder / "named", id2label={0: "fruit", 1: "metal"})
    save_documents(folder / "documents", train=2, test=1)
    (folder / "train.yaml").write_text(TRAIN)
    (folder / "bench.yaml").write_text(BENCH)
    (folder / "cuda.yaml").write_text(BENCH + "device: cuda\n")
    (folder / "methods.yaml").write_text(METHODS)
    (folder / "retrieval.yaml").write_text(RETRIEVAL)
    (folder / "retrieval_model.yaml").write_text(RETRIEVAL.replace("model: model", "model: modle"))
    (folder / "retrieval_saved.yaml").write_text(RETRIEVAL.replace("variant: linear", "model: modle"))
    (folder / "retrieval_long.yaml").write_text(RETRIEVAL.replace("min_tokens: 16", "min_tokens: 1600"))
    (folder / "retrieval_short.yaml").write_text(RETRIEVAL.replace("short_lengths: []", "short_lengths: [65]"))
    (folder / "methods_model.yaml").write_text(METHODS.replace("name: model", "name: modle"))
    (folder / "methods_documents.yaml").write_text(METHODS.replace("source: documents", "source: nowhere"))
    (folder / "methods_layers.yaml").write_text(METHODS.replace("[16]", "[16], layers: [9]"))
    (folder / "bench_model.yaml").write_text("title: t\nmodels: [{name: a, lengths: [8], checkpoint: modle}]\n")
    (folder / "syntax.yaml").write_text("model: {name: [minilm\n")
    (folder / "latin.yaml").write_bytes("model: {name: caf\xe9}\n".encode("latin-1"))
    (folder / "list.yaml").write_text("- model\n")
    (folder / "empty.yaml").write_text("")
    (folder / "file").write_text("mine")
    (folder / "blank").write_text(" \n")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")
    latin = save_documents(folder / "latin", train=2, test=1)
    (latin / "train" / "fruit" / "0.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    (folder / "nothing").mkdir()
    for name, file, content in (
        ("bad_config", "config.json", b"{"),
        ("latin_config", "config.json", '{"a": "caf\xe9"}'.encode("latin-1")),
        ("bad_weights", "model.safetensors", b"no weights"),
        ("no_weights", "model.safetensors", None),
        ("bad_tokenizer", "tokenizer.json", b'{"version": 1}'),
        ("other_family", "config.json", b'{"model_type": "t5", "architectures": ["T5Model"]}'),
        ("unknown_family", "config.json", b'{"model_type": "brot"}'),
        ("unknown_class", "config.json", None),
    ):
        save_checkpoint(folder / name)
        if content is not None:
            (folder / name / file).write_bytes(content)
        elif name == "no_weights":
            (folder / name / file).unlink()
        else:
            config = json.loads((folder / name / file).read_text())
            (folder / name / file).write_text(json.dumps({**config, "architectures": ["BrotModel"]}))
    return folder


# command line -> what the sentence says
CONVERT = {
    "convert": "Missing argument",
    "convert model": "Missing argument",
    "convert model linear": "Missing option '--output'",
    "convert modle linear --output out": "'modle' is no folder, no bundled checkpoint",
    "convert minilmm linear --output out": "Did you mean 'minilm'?",
    "convert ./modle linear --output out": "There is no folder './modle'",
    "convert /no/such/folder linear --output out": "There is no folder '/no/such/folder'",
    "convert a/b/c linear --output out": "There is no folder 'a/b/c'",
    "convert a//b linear --output out": "There is no folder 'a//b'",
    "convert bad name linear --output out": "Got unexpected extra argument",
    "convert bad*name linear --output out": "bad*name",
    "convert EMPTY linear --output out": "There is no folder ''",
    "convert file linear --output out": "'file' is a file; name the folder",
    "convert nothing linear --output out": "nothing",
    "convert bad_config linear --output out": "bad_config",
    "convert latin_config linear --output out": "latin_config",
    "convert bad_weights linear --output out": "The model of 'bad_weights' cannot be read",
    "convert no_weights linear --output out": "The model of 'no_weights' cannot be read",
    "convert bad_tokenizer linear --output out": "The tokenizer of 'bad_tokenizer' cannot be read",
    "convert other_family linear --output out": "'t5' is not supported",
    "convert unknown_family linear --output out": "brot",
    "convert unknown_class linear --output out": "the class 'BrotModel', which Transformers does not have",
    "convert model lineer --output out": "Did you mean 'linear'",
    "convert model past_only --output out": "decoders only",
    "convert model longformer --output out --option window_size=[1": "the value is not YAML",
    "convert model longformer --output out --option window_size=-4": "window_size=-4",
    "convert model longformer --output out --option window_size=many": "window_size='many'",
    "convert model longformer --output out --option window_size=4 --option window_size=8": "given twice",
    "convert model linear --output out --option =3": "takes KEY=VALUE",
    "convert model linear --output out --option max_length=64": "Unknown option",
    "convert model linear --output out --option layers=[0]": "Unknown option",
    "convert model linear --output out --option calibration=7": "Unknown option",
    "convert model linear --output out --option model=x": "Unknown option",
    "convert model linear --output out --option variant=x": "Unknown option",
    "convert model linear --output out --layers 0;1": "--layers takes integers with commas between them, or auto",
    "convert model linear --output out --layers 7": "7",
    "convert model linear --output out --max-length 0": "Invalid value for '--max-length'",
    "convert model linear --output out --max-length -5": "Invalid value for '--max-length'",
    "convert model linear --output out --max-length many": "Invalid value for '--max-length'",
    "convert model linear --output out --max-length 8": "8",
    "convert model linear --output out --extend stretch": "stretch",
    "convert model linear --output file": "The output 'file' is a file; a folder is needed",
    "convert model linear --output file --overwrite": "The output 'file' is a file; a folder is needed",
    "convert model linear --output file/out": "which is a file",
    "convert model linear --output full": "'full' is not empty: name another one, or pass --overwrite",
    "convert model linear --output model": "'model' is not empty: name another one, or pass --overwrite",
    "convert model linear --outptu out": "No such option",
    "convert model linear --output out --calibration nowhere.txt": "there is no file or folder 'nowhere.txt'; allowed:",
    "convert model linear --output out --calibration EMPTY": "there is no file or folder ''",
    "convert model linear --output out --calibration sotu": "one folder of .txt files, auto or none",
    "convert model linear --output out --calibration none --calibration auto": "none goes with no other",
    "convert model linear --output out --calibration file --calibration auto": "auto goes with no other",
    "convert model linear --output out --calibration file --calibration full": "full goes with no other",
    "convert model linear --output out --calibration file --calibration ./file": "./file is given twice",
    "convert model linear --output out --calibration documents": "no .txt file in the folder 'documents' itself",
    "convert model linear --output out --calibration blank": "blank holds no text",
    "convert model linear --output out --calibration latin/train/fruit": "0.txt is not UTF-8 text",
    "convert model linear --output out --calibration file --calibration-documents 1": "goes with a folder or auto",
    "convert model linear --output out --calibration full --calibration-documents 2": "documents 2: there are 1",
    "convert model linear --output out --calibration full --calibration-documents 0": "Invalid value for",
    "convert model linear --output out --calibration file --calibration-length 65": "the model reads 64 tokens",
    "convert model linear --output out --calibration file --calibration-length 2": "Invalid value for",
    "convert model linear --output out --calibration file --calibration-steps -1": "Invalid value for",
    "convert model linear --output out --calibration none --calibration-steps 5": "steps 5 needs documents",
    "convert model linear --output out --calibration none --calibration-documents 5": "--calibration none leaves",
    "convert model linear --output out --calibration none --calibration-length 9": "--calibration none leaves",
    "convert model linear --output out --calibration none --layers auto --keep-softmax 1": "auto needs documents",
    "convert model linear --output out --calibration file --layers auto": "needs keep_softmax from 1 to 1",
    "convert model linear --output out --calibration file --layers auto --keep-softmax 2": "from 1 to 1, got 2",
    "convert model linear --output out --calibration file --keep-softmax 1": "goes with layers='auto'",
    "convert model linear --output out --calibration file --keep-softmax-by states": "goes with layers='auto'",
    "convert model linear --output out --calibration file --layers auto --keep-softmax 1 --keep-softmax-by logits": (
        "keep_softmax_by='logits'; allowed: 'output', 'states' or None"
    ),
    "convert headless linear --output out --calibration file --layers auto --keep-softmax 1 --keep-softmax-by output": (
        "keep_softmax_by='output': BertModel has no head; allowed: 'states' or None"
    ),
    "convert model linear --output out --layers all": "--layers takes integers with commas between them, or auto",
}
TRAINING = {
    "train": "Missing argument",
    "train no.yaml": "There is no recipe 'no.yaml'",
    "train documents": "There is no recipe 'documents'",
    "train syntax.yaml": "'syntax.yaml' is not YAML in UTF-8",
    "train latin.yaml": "'latin.yaml' is not YAML in UTF-8",
    "train list.yaml": "recipe must be a mapping",
    "train empty.yaml": "Missing key",
    "train train.yaml --set training.max_steps=[1": "the value is not YAML",
    "train train.yaml --set training.max_steps": "takes KEY=VALUE",
    "train train.yaml --set model.kwargs.dropuot=0.1": "model.kwargs has 'dropuot', which 'model' does not take",
    "train train.yaml --set training.epochs=1": "TrainingArguments has none of that name",
    "train train.yaml --set distill.max_length=1": "The recipe has no stage distill",
    "train train.yaml --set epochs=1": "SECTION.KEY=VALUE",
    "train train.yaml --set finetune=null": "finetune: name a key of the stage, as in finetune.max_length",
    "train train.yaml --set finetune.lora.rank=4": "Allowed: r, alpha, dropout, target_modules",
    "train train.yaml --set finetune.max_length.x=4": "max_length must be int, got {'x': 4}",
    "train train.yaml --set data.source.train=a.jsonl": "source is no mapping but 'documents'",
    "train train.yaml --set nosection.epochs=1": "nosection",
    "train train.yaml --set finetune.max_length=-5": "finetune.max_length must be a finite number above 0",
    "train train.yaml --set finetune.max_length=many": "max_length must be int",
    "train train.yaml --set training.save_strategy=often": "often",
    "train train.yaml --set training.learning_rate=-1": "learning_rate must be a finite number above 0",
    "train train.yaml --set finetune.trainable=last_layers:9": "the model has 2 layers",
    "train train.yaml --from-stage distill": "from_stage='distill'; the stages of this recipe: finetune",
    "train train.yaml --until-stage transfer": "until_stage='transfer'",
    "train train.yaml --set training.output_dir=file": "The output 'file' is a file",
    "train train.yaml --set training.output_dir=full": "pass --overwrite",
    "train train.yaml --set training.resume_from_checkpoint=nowhere": "hf-linear-attn train --resume",
    "train train.yaml --set evaluation.metrics=[acuracy]": "acuracy",
    "train train.yaml --set evaluation.batch_size=0": "evaluation.batch_size must be positive",
    "train train.yaml --set data.source=nowhere": "'nowhere' is none of",
    "train train.yaml --set data.source=latin": "0.txt is not UTF-8",
    "train train.yaml --set data.max_train_documents=-3": "data.max_train_documents must be positive",
    "train train.yaml --set data.shuffle_buffer=100": "shuffles a stream, and needs data.streaming: true",
    "train train.yaml --set model.name=modle": "'modle' is no folder",
    "train train.yaml --set conversion.variant=lineer": "Did you mean 'linear'",
    "train train.yaml --set conversion={variant:linear,options:{layers:[0]}}": "SECTION.KEY=VALUE",
    "train train.yaml --set conversion.options={layers:[0]} --set conversion.variant=linear": "Unknown option",
    "train train.yaml --set conversion.variant=linear --set conversion.options={max_length:64}": "Unknown option",
    "compare train.yaml --variants lineer": "Did you mean 'linear'",
    "compare train.yaml --variants linear,": "names with commas",
    "compare train.yaml --set training.output_dir=full": "pass --overwrite",
    "compare train.yaml --set evaluation.forward_lengths=[-1]": "evaluation.forward_lengths must be at least 1",
    "compare train.yaml --set evaluation.confidence=7": "evaluation.confidence must be between 0 and 1",
    "compare syntax.yaml": "'syntax.yaml' is not YAML in UTF-8",
    "demo --recipe no.yaml": "There is no recipe 'no.yaml'",
    "demo --recipe latin.yaml": "'latin.yaml' is not YAML in UTF-8",
    "demo --recipe train.yaml --set training.output_dir=full": "pass --overwrite",
}
MEASURING = {
    "report modle --variant linear --output out --documents documents": "'modle' is no folder",
    "report model --output out --documents documents": "name what to convert it to, --variant KEY",
    "report model --variant linear --output full": "pass --overwrite",
    "report model --variant linear --output file": "The output 'file' is a file",
    "report model --variant linear --length -5 --output out": "Invalid value for '--length'",
    "report model --variant linear --test 0 --output out": "Invalid value for '--test'",
    "report model --variant linear --calibration -1 --output out": "Invalid value for '--calibration'",
    "report model --variant linear --option layers=[0] --output out": "Unknown option",
    "report model --variant linear --option x=[1 --output out": "the value is not YAML",
    "report model --variant linear --documents nowhere --output out": "'nowhere' is none of",
    "report model --variant linear --documents latin --length 16 --output out": "0.txt is not UTF-8",
    "report model --variant linear --documents documents --length 5000 --output out": "documents have 5000 tokens",
    "report model --variant linear --layers 9 --documents documents --output out": "9",
    "analyze modle --output out": "'modle' is no folder",
    "analyze model --methods lineer --documents documents --output out": "Did you mean 'linear'",
    "analyze model --methods linear --layers 9 --documents documents --length 16 --output out": "9",
    "analyze model --pattern-tokens -3 --output out": "Invalid value for '--pattern-tokens'",
    "analyze model --output full": "pass --overwrite",
    "methods no.yaml --output out": "There is no recipe 'no.yaml'",
    "methods syntax.yaml --output out": "'syntax.yaml' is not YAML in UTF-8",
    "methods methods.yaml --methods lineer --output out": "Did you mean 'linear'",
    "methods methods.yaml --output full": "pass --overwrite",
    "methods methods_model.yaml --output out": "'modle' is no folder",
    "methods methods_documents.yaml --output out": "'nowhere' is none of",
    "methods methods_layers.yaml --output out": "9",
    "bench bench_model.yaml --output out": "'modle' is no folder",
    "methods train.yaml --output out": "Unknown key(s)",
    "retrieval no.yaml --output out": "There is no recipe 'no.yaml'",
    "retrieval train.yaml --output out": "Unknown key(s)",
    "retrieval syntax.yaml --output out": "'syntax.yaml' is not YAML in UTF-8",
    "retrieval retrieval.yaml --output full": "pass --overwrite",
    "retrieval retrieval.yaml --output file": "The output 'file' is a file",
    "retrieval retrieval_model.yaml --output out": "'modle' is no folder",
    "retrieval retrieval_saved.yaml --output out": "'modle' is no folder",
    "retrieval retrieval_long.yaml --output out": "0 of 2 documents of 'documents' have 1600 tokens",
    "retrieval retrieval_short.yaml --output out": "recipe.short_lengths has [65]",
    "demo --recipe train.yaml --embedders no.yaml": "There is no recipe 'no.yaml'",
    "bench no.yaml --output out": "There is no recipe 'no.yaml'",
    "bench latin.yaml --output out": "'latin.yaml' is not YAML in UTF-8",
    "bench bench.yaml --threads -1 --output out": "threads has -1",
    "bench bench.yaml --variants lineer --output out": "Did you mean 'linear'",
    "bench bench.yaml --output full": "pass --overwrite",
    "bench bench.yaml --output file": "The output 'file' is a file",
    "advise modle --length 64": "'modle' is no folder",
    "advise model": "Missing option '--length'",
    "advise model --length -1": "length=-1",
    "advise model --length 64 --batch-size 0": "batch_size=0",
    "advise model --length 64 --seconds -1": "budget_seconds=-1",
    "advise model --length 64 --lengths 128": "lengths=[128]",
    "advise model --length 64 --variants linear,,": "names with commas",
    "advise model --length 64 --output full": "The output 'full' is a folder",
    "advise model --length 64 --output file": "The output 'file' exists",
    "advise other_family --length 64": "'t5' is not supported",
    "list lineer": "Did you mean 'linear'",
    "lsit": "No such command",
}
EVALUATING = {
    "evaluate": "Missing argument",
    "evaluate named": "Missing option '--data'",
    "evaluate modle --data documents": "'modle' is no folder",
    "evaluate nothing --data documents": "nothing",
    "evaluate bad_config --data documents": "bad_config",
    "evaluate bad_weights --data documents": "does not know the label(s) fruit, metal of 'documents'; it knows 0, 1",
    "evaluate bad_tokenizer --data documents": "The tokenizer of 'bad_tokenizer' cannot be read",
    "evaluate unknown_class --data documents": "is BrotModel, which has no head that is measured here",
    "evaluate other_family --data documents": "is T5Model, which has no head that is measured here",
    "evaluate named --data nowhere": "'nowhere' is none of",
    "evaluate named --data source=nowhere": "'nowhere' is none of",
    "evaluate named --data latin": "0.txt is not UTF-8 text",
    "evaluate named --data seed=1": "--data names no source; given: seed",
    "evaluate named --data EMPTY": "--data names no source; given: source",
    "evaluate named --data documents --data nothing": "--data source is given twice",
    "evaluate named --data documents --data sources=x": "Unknown key(s) ['sources'] in data",
    "evaluate named --data documents --data seed=many": "data.seed must be int",
    "evaluate named --data documents --data folds=2": "data.folds=2",
    "evaluate named --data documents --data fields={txt:text}": "txt",
    "evaluate named --data documents --data options={x:1}": "Unknown option(s) 'x:1'",
    "evaluate named --data documents --data max_test_documents=0": "max_test_documents must be positive",
    "evaluate named --data [documents": "the value is not YAML",
    "evaluate named --data documents --part rest": "part='rest'; allowed: test, train, all",
    "evaluate named --data documents --metrics acuracy": "Did you mean 'accuracy'",
    "evaluate named --data documents --metrics accuracy,": "names with commas",
    "evaluate named --data documents --metrics perplexity": "measures text, not sequence_classification",
    "evaluate named --data documents --max-length 0": "Invalid value for '--max-length'",
    "evaluate named --data documents --max-length 65": "max_length=65, but 'named' reads 64 tokens at most",
    "evaluate named --data documents --batch-size 0": "Invalid value for '--batch-size'",
    "evaluate named --data documents --output full": "The output 'full' is a folder",
    "evaluate named --data documents --output file": "The output 'file' exists",
    "evaluate named --data documents --output file/out": "which is a file",
    "evaluate named --data documents --predictions file": "The output 'file' exists",
    "evaluate named --data documents --output out/a --predictions out/a": "name one file, 'out/a'",
    "compare train.yaml --set evaluation.models=[modle]": "'modle' is no folder",
    "compare train.yaml --set evaluation.models=[model]": "does not know the label(s) fruit, metal",
    "compare train.yaml --set evaluation.models=[model,./model]": "rows need names of their own",
    "compare train.yaml --set evaluation.models=model": "evaluation.models must be a list",
}
NO_CUDA = {
    "bench cuda.yaml --output out": "no CUDA device",
    "bench bench.yaml --device cuda --output out": "no CUDA device",
    "advise model --length 64 --device cuda": "no CUDA device",
}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check(line: str, message: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hf_linear_attn.training.setup.reuse_freed_memory", lambda: None)
    transformers_logging.disable_progress_bar()
    before = content(place)
    monkeypatch.setattr("sys.argv", ["hf-linear-attn", *line.split()])
    result = runner.invoke(app, ["" if word == "EMPTY" else word for word in line.split()])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert message in result.output
    assert "Traceback" not in result.output
    errors = [row for row in result.output.splitlines() if row.startswith("Error: ")]
    assert len(errors) == 1 or (result.exit_code == 2 and "Usage: " in result.output)
    assert result.exit_code == 2 or result.output.rstrip().splitlines()[-1] == errors[0]
    made = (place / "out").exists()
    shutil.rmtree(place / "out", ignore_errors=True)
    assert content(place) == before
    assert not made


@pytest.mark.usefixtures("past_only")
@pytest.mark.parametrize("line", CONVERT)
def test_convert(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, CONVERT[line], place, monkeypatch)


@pytest.mark.parametrize("line", TRAINING)
def test_training(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, TRAINING[line], place, monkeypatch)


@pytest.mark.parametrize("line", MEASURING)
def test_measuring(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, MEASURING[line], place, monkeypatch)


@pytest.mark.parametrize("line", EVALUATING)
def test_evaluating(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, EVALUATING[line], place, monkeypatch)


@pytest.mark.parametrize("line", NO_CUDA)
def test_a_device_that_is_not_there(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check(line, NO_CUDA[line], place, monkeypatch)
