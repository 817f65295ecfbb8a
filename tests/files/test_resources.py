"""Shipped files are found, and the cache is where the environment says."""

import pytest

from moejax.core.errors import DataError
from moejax.files import cache_root, content_hash, find_resource, sha256_of_file


def test_configs_of_the_working_folder_come_first(tmp_path, monkeypatch):
    """Catches a search that prefers the shipped file to the researcher's own of the same name."""
    own = tmp_path / "configs" / "models" / "mine.gin"
    own.parent.mkdir(parents=True)
    own.write_text("")
    monkeypatch.chdir(tmp_path)
    assert find_resource("configs", "models/mine.gin") == own
    assert find_resource("configs", "configs/models/mine.gin") == own


def test_assets_are_found_from_anywhere(tmp_path, monkeypatch):
    """Catches assets that are looked up relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    assert find_resource("assets", "tokenizer/tokenizer.json").is_file()


@pytest.mark.parametrize("relative", ["../secret", "/etc/passwd", "a/../../b"])
def test_resources_stay_inside_their_folder(relative):
    """Catches a config that reads files outside of the folders it may name."""
    with pytest.raises(DataError, match="leaves its folder"):
        find_resource("assets", relative)


def test_missing_resource_shows_near_names():
    """Catches an error that leaves the reader with a typing mistake alone."""
    with pytest.raises(DataError) as caught:
        find_resource("assets", "tokenizer/tokeniser.json")
    assert "tokenizer/tokenizer.json" in caught.value.fix


def test_cache_root_follows_the_environment(tmp_path, monkeypatch):
    """Catches a cache folder that is fixed at import."""
    monkeypatch.setenv("MOEJAX_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("MOEJAX_CACHE")
    assert cache_root().parts[-2:] == (".cache", "moejax")


def test_content_hash_depends_on_content_alone(tmp_path):
    """Catches hashes that depend on dict order, run parts together or take objects by address."""
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    assert content_hash("ab", "c") != content_hash("a", "bc")
    with pytest.raises(TypeError):
        content_hash(object())
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "f").startswith("ba7816bf8f01cfea")
