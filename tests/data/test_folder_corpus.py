"""FolderCorpus: three formats, groups by subfolder, copies on one side, clear refusals."""

import json
import sys

import pytest

from moejax.core.errors import DataError
from moejax.data import SPLITS, FolderCorpus


def _documents(corpus, group, splits=SPLITS):
    return [text for split in splits for text in corpus.documents(group, split)]


def test_groups_and_formats(tmp_path):
    """Catches formats that lose documents, and groups that are not the subfolders."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    for group in ("news", "code"):
        (tmp_path / group / "deep").mkdir(parents=True)
    lines = [json.dumps({"text": f"line {i}\u2028x", "id": i}) for i in range(40)]
    (tmp_path / "news" / "a.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "code" / "deep" / "b.txt").write_text("one\n\ntwo\n")
    rows = pyarrow.table({"text": ["row 0", None, "row 2"], "other": [1, 2, 3]})
    parquet.write_table(rows, tmp_path / "code" / "c.parquet")
    (tmp_path / "code" / "ignored.md").write_text("not read")
    corpus = FolderCorpus(tmp_path)
    assert corpus.groups == ("code", "news")
    expected = [f"line {i}\u2028x" for i in range(40)]
    assert sorted(_documents(corpus, "news")) == sorted(expected)
    assert sorted(_documents(corpus, "code")) == ["one\n\ntwo", "row 0", "row 2"]


def test_a_flat_folder_is_one_group(tmp_path):
    """Catches a folder of files without subfolders that has no group at all."""
    (tmp_path / "poems").mkdir()
    (tmp_path / "poems" / "a.txt").write_text("one")
    assert FolderCorpus(tmp_path / "poems").groups == ("poems",)


def test_copies_are_on_one_side_and_every_document_on_one(tmp_path):
    """Catches a split by file or line number: a copied document would be trained on and tested."""
    lines = [json.dumps({"body": f"document {i}"}) + "\n" for i in range(300)]
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jsonl").write_text("".join(lines))
    (tmp_path / "x" / "b.jsonl").write_text("".join(reversed(lines)))
    corpus = FolderCorpus(tmp_path, field="body", heldout_share=0.2)
    sides = {split: set(corpus.documents("x", split)) for split in SPLITS}
    assert all(sides.values())
    assert sum(map(len, sides.values())) == 300
    assert len(_documents(corpus, "x")) == 600


def test_one_long_text_gives_all_splits(tmp_path):
    """Catches a book in one file that is one document, so that nothing can be held out."""
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 300 for i in range(200))
    (tmp_path / "book.txt").write_text(text)
    corpus = FolderCorpus(tmp_path, heldout_share=0.2)
    (group,) = corpus.groups
    assert all(list(corpus.documents(group, split)) for split in SPLITS)
    assert "\n\n".join(corpus._texts(tmp_path / "book.txt")) == text


def test_fingerprint_follows_the_content(tmp_path):
    """Catches a cache of tokens that survives a change of the text or of how it is read."""
    (tmp_path / "a.txt").write_text("one")
    first = FolderCorpus(tmp_path).fingerprint
    assert FolderCorpus(tmp_path).fingerprint == first
    assert FolderCorpus(tmp_path, heldout_share=0.1).fingerprint != first
    (tmp_path / "a.txt").write_text("two")
    assert FolderCorpus(tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 is no JSON"), ('{"body": "x"}', "line 2 has no text"), ("[1]", "line 2 has no")],
)
def test_bad_lines_are_named(tmp_path, line, message):
    """Catches a bad line that is skipped without a word or fails without its number."""
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        _documents(FolderCorpus(tmp_path), tmp_path.name)


def test_missing_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    """Catches an ImportError in the middle of a run, and pyarrow as a requirement of .txt."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.txt").write_text("fine")
    assert _documents(FolderCorpus(tmp_path), tmp_path.name) == ["fine"]
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow") as caught:
        _documents(FolderCorpus(tmp_path), tmp_path.name)
    assert "moejax[data]" in caught.value.fix


def test_bad_parquet_files_are_named(tmp_path):
    """Catches a raw ArrowInvalid, and a column that is missing."""
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        _documents(FolderCorpus(tmp_path), tmp_path.name)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(DataError, match=r"a\.parquet cannot be read"):
        _documents(FolderCorpus(tmp_path), tmp_path.name)


def test_folders_without_text_are_refused(tmp_path):
    """Catches an empty corpus that fails only when the first batch is asked for."""
    with pytest.raises(DataError, match="does not exist"):
        FolderCorpus(tmp_path / "none")
    with pytest.raises(DataError, match="holds no text"):
        FolderCorpus(tmp_path)
    with pytest.raises(DataError, match=r"heldout_share = 0\.6"):
        FolderCorpus(tmp_path, heldout_share=0.6)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="cannot be read"):
        _documents(FolderCorpus(tmp_path), tmp_path.name)
