"""Sharing converted models on the Hub: weights, model card, and what others need to load them.

`model.push_to_hub(repo_id)` of a converted model ends up here. Beside what Transformers uploads, the
repository gets

- a model card (`model_card.py`), unless someone has written one by hand;
- `auto_map` in `config.json` and a few lines of `loader.py`, so that `trust_remote_code=True` loads the
  model in a process that has this package installed but has not imported it.

A process that did import the package never runs the loader: Transformers prefers registered classes.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from hf_linear_attn import auto
from hf_linear_attn.data.companions import checkpoint_folder, find_companions
from hf_linear_attn.data.models import load_config, load_tokenizer, named_errors
from hf_linear_attn.model_card import GENERATED_MARKER, find_base_model, known_license, model_card
from hf_linear_attn.saving import stale_weights

__all__ = ["auto_map_for", "load_converted", "prepare_for_hub", "push_to_hub", "save_and_push"]

logger = logging.get_logger(__name__)

# What Transformers puts into a card of its own making: nobody's work is lost by replacing it.
TRANSFORMERS_MARKER = "This model card has been automatically generated."
_TRAINING = "train_result.json"  # what `hf-linear-attn train` leaves in the folder of its model

LOADER = '''"""Lets Transformers load this model with `trust_remote_code=True`; the code is in a package.

    pip install hf-linear-attn
"""

import hf_linear_attn
from hf_linear_attn import auto


def __getattr__(name):
    """The converted model and config classes that `auto_map` in config.json names."""
    return getattr(auto, name)
'''


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    *,
    results: Mapping[str, Any] | str | Path | None = None,
    base_model: str | None = None,
    row: str | None = None,
    license: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str | None = "50GB",
    tags: Sequence[str] | str | None = None,
    folder: str | Path | None = None,
    card_only: bool = False,
    saving: Mapping[str, Any] | None = None,
) -> CommitInfo:
    """Upload a converted model with its card and loader, in one commit; creates the repository if there is none.

    A push that is interrupted leaves the revision that was there. Weights of an earlier push in another form (a single
    file where the new ones are shards) go with it.

    The arguments from `commit_message` to `tags` are those of Transformers' `push_to_hub`.

    Args:
        model: a model that `convert_model` has converted.
        repo_id: "namespace/name", or a name below the token's user.
        results: contents or path of a `results.json` of `hf-linear-attn compare`, for the card.
        base_model: Hub id of the checkpoint that was converted; by default the id the model was loaded from.
        row: name of this model's row in `results`, where variant and options do not single it out.
        license: license id for the card; by default that of the base model's card, if it says one.
        private: visibility of a new repository.
        token: access token; by default the one that `hf auth login` stored.
        revision: branch to upload to, created if there is none.
        create_pr: upload as a pull request.
        max_shard_size: size above which the weights are split into several files.
        tags: more tags for the card.
        folder: where the model was saved: its tokenizer and what else of a checkpoint lies there (a sentence encoder's
            modules, a chat template) go along, and its training into the card. By default the model goes alone.
        card_only: upload the card and nothing else, to a repository that holds the model.
        saving: more arguments of `save_pretrained`, such as `state_dict` and `variant`.

    Returns:
        The commit, as Transformers' `push_to_hub` does.

    Raises:
        ValueError: if the model is not converted, `results` does not tell which row is this model's, `folder` holds no
            tokenizer, or `card_only` finds no model to describe.
        huggingface_hub.errors.HfHubHTTPError: if the Hub refuses (no such token, no right to write).
    """
    api = HfApi(token=token)
    all_tags = [tags] if isinstance(tags, str) else list(tags or [])
    all_tags += [tag for tag in model.model_tags or [] if tag not in all_tags]
    facts: dict[str, Any] = {"results": results, "row": row, "training": _training_of(folder)}
    # Before anything is created: a model, results or a folder that make no card fail here.
    model_card(model, base_model=base_model, license=license, **facts)
    tokenizer = None if folder is None else load_tokenizer(str(Path(folder).resolve()))
    if card_only:
        repo_id = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        if not api.file_exists(repo_id, "config.json", revision=revision):
            raise ValueError(f"{repo_id!r} holds no model that a card could describe: push it whole first.")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    existing = _existing_card(repo_id, revision, api)
    base_model = base_model or _base_model_on_hub(model, repo_id, existing, api)
    if license is None:
        license = known_license(base_model, token, online=True) or known_license(model.name_or_path)
    facts |= {"base_model": base_model, "license": license, "repo_id": repo_id, "tags": all_tags}
    commit: dict[str, Any] = {"repo_id": repo_id, "revision": revision, "create_pr": create_pr}
    commit["commit_message"] = commit_message or f"Upload {'the card of ' if card_only else ''}{type(model).__name__}"
    commit["commit_description"] = commit_description
    if card_only:
        card = str(_card(model, existing, **facts)).encode()
        return api.upload_file(path_or_fileobj=card, path_in_repo="README.md", **commit)
    with tempfile.TemporaryDirectory() as place:
        companions = None if folder is None else find_companions(str(folder))
        with checkpoint_folder(Path(place), companions, None) as stage:
            model.save_pretrained(stage, **{"max_shard_size": max_shard_size, **(saving or {})})  # type: ignore[arg-type]
            if tokenizer is not None:
                tokenizer.save_pretrained(stage)
        prepare_for_hub(model, place, existing_card=existing, **facts)
        new = [path.relative_to(place).as_posix() for path in Path(place).rglob("*") if path.is_file()]
        stale = stale_weights(api.list_repo_files(repo_id, revision=revision), new)
        return api.upload_folder(folder_path=place, delete_patterns=stale or None, **commit)


def load_converted(folder: str | Path) -> PreTrainedModel:
    """A converted model from where it was saved, under the class that its config names.

    Raises:
        ValueError: for a folder that holds no converted model, or one that cannot be read whole.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{str(folder)!r} is no folder; allowed: one that a converted model was saved to.")
    config = load_config(str(Path(folder).resolve()))  # a bundled model may be called like a relative path
    if getattr(config, "linear_attn", None) is None or not config.architectures:
        raise ValueError(f"{str(folder)!r} holds no converted model: convert one first, `hf-linear-attn convert`.")
    with named_errors(str(folder)):
        return getattr(auto, config.architectures[0]).from_pretrained(folder)


def save_and_push(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """What `model.save_pretrained(save_directory, push_to_hub=True, ...)` means for a converted model.

    Args:
        model: a converted model.
        save_directory: folder to save to; its name is the repository's unless `repo_id` is given.
        *args, **kwargs: arguments of `save_pretrained` and of `push_to_hub`, without `push_to_hub` itself.

    Raises:
        As `save_pretrained` and `push_to_hub`.
    """
    kwargs |= dict(zip(list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[2:], args, strict=False))
    names = inspect.signature(push_to_hub).parameters.keys() - {"model", "max_shard_size", "token"}
    options = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    repo_id = options.pop("repo_id", Path(save_directory).name)
    model.save_pretrained(save_directory, **kwargs)
    if kwargs.pop("is_main_process", True):  # the others have nothing to push
        push_to_hub(model, repo_id, token=kwargs.get("token"), saving=kwargs, **options)


def prepare_for_hub(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    results: Mapping[str, Any] | str | Path | None = None,
    base_model: str | None = None,
    row: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
    existing_card: ModelCard | None = None,
) -> None:
    """Add card, `auto_map` and loader to a folder that `model.save_pretrained` has written.

    Args:
        model: the converted model.
        folder: where it was saved; uploading it by any means gives a complete repository.
        existing_card: the repository's present card. One written by hand is kept and only gains tags.
        results, base_model, row, license, repo_id, tags, training: as in `model_card`.

    Raises:
        FileNotFoundError: if the folder holds no `config.json`.
        ValueError: as in `model_card`.
    """
    folder, facts = Path(folder), {"results": results, "base_model": base_model, "row": row, "license": license}
    card = _card(model, existing_card, **facts, repo_id=repo_id, tags=tags, training=training)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = auto_map_for(model)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "loader.py").write_text(LOADER, encoding="utf-8")
    card.save(folder / "README.md")


def auto_map_for(model: PreTrainedModel) -> dict[str, str]:
    """`auto_map` of a converted model: every Auto class that knows its config, to a name in the loader."""
    config_class = type(model.config)
    mapped = {"AutoConfig": f"loader.{config_class.__name__}"}
    for name, auto_class in sorted(vars(modeling_auto).items()):
        if not (isinstance(auto_class, type) and issubclass(auto_class, _BaseAutoModelClass)):
            continue
        mapping: Any = auto_class._model_mapping
        if name.startswith("Auto") and mapping is not None and config_class in mapping:
            known = mapping[config_class]
            known = known[0] if isinstance(known, (tuple, list)) else known
            mapped[name] = f"loader.{known.__name__}"
    return mapped


def _card(model: PreTrainedModel, existing: ModelCard | None, **facts: Any) -> ModelCard:
    """The card to upload: `model_card`'s, or the present one with its tags where that was written by hand."""
    card = model_card(model, **facts)
    if existing is None or _may_be_replaced(existing):
        return card
    logger.info(f"{facts['repo_id'] or type(model).__name__} has a card of its own: only its tags are updated.")
    data: Any = existing.data
    own: Any = card.data
    present = data.tags or []
    data.tags = [*present, *(tag for tag in own.tags if tag not in present)]
    return existing


def _training_of(folder: str | Path | None) -> Mapping[str, Any] | None:
    """What `hf-linear-attn train` wrote of the model in a folder; None where it was not made by it."""
    path = None if folder is None else Path(folder) / _TRAINING
    return None if path is None or not path.is_file() else json.loads(path.read_text(encoding="utf-8"))


def _existing_card(repo_id: str, revision: str | None, api: HfApi) -> ModelCard | None:
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision)
    except EntryNotFoundError:
        return None
    # Shown to be malformed by the Hub itself when it is uploaded; not a reason to fail here.
    return ModelCard.load(path, ignore_metadata_errors=True)


def _may_be_replaced(card: ModelCard) -> bool:
    return GENERATED_MARKER in card.content or TRANSFORMERS_MARKER in card.content


def _base_model_on_hub(model: PreTrainedModel, repo_id: str, existing: ModelCard | None, api: HfApi) -> str | None:
    """Hub id of the base model that the card may name, or None.

    A model that was loaded from the repository it is pushed to is not its own base: the present card knows.
    """
    name = find_base_model(model)
    if name == repo_id:
        data: Any = None if existing is None else existing.data
        present = None if data is None else data.base_model
        return present[0] if isinstance(present, list) else present
    if name is not None and not api.repo_exists(name):
        logger.info(f"The card names no base model: {name!r}, where the model was loaded from, is not on the Hub.")
        return None
    return name
