"""What word counts achieve on the first tokens of each document: how much the later text adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import concatenate_datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import PreTrainedTokenizerBase

from hf_linear_attn.data.task import DocumentTask
from hf_linear_attn.data.tokenization import encode_leading

__all__ = ["bag_of_words_baseline", "bag_of_words_correct"]


def bag_of_words_correct(
    task: DocumentTask,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None,
    *,
    cross_validated: bool = False,
    folds: int = 5,
) -> np.ndarray:
    """Which documents a TF-IDF logistic regression on the first tokens classifies correctly.

    Args:
        task: the documents.
        tokenizer: cuts the documents where a model would, so that the numbers can be compared.
        num_tokens: read so many tokens of each document, special tokens not counted; None reads all.
        cross_validated: instead of train -> test, predict every document of both parts by a model that was
            fitted without its group.
        folds: folds of the cross-validation.

    Returns:
        bool array, one entry per test document (per document of train, then test, when cross-validated).
    """
    if not cross_validated:
        model = _model()
        model.fit(_tokens(task.train["text"], tokenizer, num_tokens), task.train["label"])
        predicted = model.predict(_tokens(task.test["text"], tokenizer, num_tokens))
        return predicted == np.asarray(task.test["label"])
    both = concatenate_datasets([task.train, task.test])
    texts = np.asarray(_tokens(both["text"], tokenizer, num_tokens), dtype=object)
    labels = np.asarray(both["label"])
    correct = np.zeros(len(labels), dtype=bool)
    for train, test in GroupKFold(folds).split(texts, labels, groups=list(both["group"])):
        correct[test] = _model().fit(texts[train], labels[train]).predict(texts[test]) == labels[test]
    return correct


def bag_of_words_baseline(
    task: DocumentTask,
    tokenizer: PreTrainedTokenizerBase,
    num_tokens: int | None,
    *,
    cross_validated: bool = False,
    folds: int = 5,
) -> float:
    """Accuracy of TF-IDF logistic regression on the first `num_tokens` tokens; see `bag_of_words_correct`."""
    return float(bag_of_words_correct(task, tokenizer, num_tokens, cross_validated=cross_validated, folds=folds).mean())


def _model() -> Pipeline:
    # Documents arrive as lists of tokens joined by spaces: the vectorizer only splits them again.
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", lowercase=False, sublinear_tf=True, min_df=2)
    return make_pipeline(vectorizer, LogisticRegression(C=10.0, max_iter=2000))


def _tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int | None) -> list[str]:
    encoded = encode_leading(texts, tokenizer, num_tokens, add_special_tokens=False)
    return [" ".join(tokenizer.convert_ids_to_tokens(ids)) for ids in encoded]
