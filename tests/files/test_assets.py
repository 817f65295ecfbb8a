"""Pinned packages: fetched by pip from a local folder, checked, unpacked inside their folder."""

import hashlib
import os
import zipfile

import pytest

from moejax.core.errors import DataError
from moejax.files import ASSETS, AssetSource, extract_member, fetch
from moejax.runs import progress

METADATA = "Metadata-Version: 2.1\nName: tinytext\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder with one wheel, the only index that pip is told of."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tinytext-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinytext/data/text.db", "some text\n" * 50)
        wheel.writestr("tinytext-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("tinytext-1.0.dist-info/WHEEL", WHEEL)
        wheel.writestr("tinytext-1.0.dist-info/RECORD", "")
    _only_index(monkeypatch, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    return folder


def test_fetch_delivers_the_member_once(index, tmp_path):
    """Catches a fetch that asks pip again for what lies in the cache, or that leaves scraps."""
    asset = _asset(index)
    path = fetch(asset, tmp_path / "cache", progress)
    assert path.read_text() == "some text\n" * 50
    next(index.iterdir()).unlink()  # a second download would fail now
    assert fetch(asset, tmp_path / "cache") == path
    assert [p.name for p in (tmp_path / "cache").rglob(".*")] == []


def test_damaged_cache_is_fetched_again(index, tmp_path):
    """Catches a cache that trusts a file because it is there."""
    asset = _asset(index, member=None)
    path = fetch(asset, tmp_path / "cache")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert fetch(asset, tmp_path / "cache").read_bytes() == whole


def test_wrong_hash_is_refused_and_not_kept(index, tmp_path):
    """Catches a fetch that checks the hash after the file is in the cache, or not at all."""
    asset = _asset(index, sha256="0" * 64)
    with pytest.raises(DataError, match="expected 0000"):
        fetch(asset, tmp_path / "cache")
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    """Catches a traceback of subprocess, or an empty reason, where there is no network."""
    _only_index(monkeypatch, PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES="0")
    asset = AssetSource("tinytext", "1.0", None, "0" * 64, 1000, "none")
    with pytest.raises(DataError, match=r"could not download tinytext 1\.0: ERROR") as caught:
        fetch(asset, tmp_path / "cache")
    assert "MOEJAX_CACHE" in caught.value.fix
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("member", ["../evil", "a/../../evil", "/etc/evil", "..\\evil"])
def test_members_cannot_leave_their_folder(tmp_path, member):
    """Catches zip members that write outside of the folder they are unpacked into."""
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr(member, "evil")
    with pytest.raises(DataError, match="leads out of its folder"):
        extract_member(archive, member, tmp_path / "in")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.whl"]


def test_a_link_in_the_folder_is_not_followed_out(tmp_path):
    """Catches a check of the name alone: the folder may hold a link to elsewhere."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "out", tmp_path / "in" / "link")
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as bundle:
        bundle.writestr("link/evil", "evil")
    with pytest.raises(DataError, match="leads out of its folder"):
        extract_member(tmp_path / "a.whl", "link/evil", tmp_path / "in")


def test_member_that_is_missing_or_damaged_is_named(tmp_path):
    """Catches a raw KeyError or BadZipFile, and a member that is half unpacked."""
    (tmp_path / "a.whl").write_bytes(b"no zip file")
    with pytest.raises(DataError, match="no readable member 'text'"):
        extract_member(tmp_path / "a.whl", "text", tmp_path / "in")
    with zipfile.ZipFile(tmp_path / "b.whl", "w") as bundle:
        bundle.writestr("text", "x" * 1000)
    damaged = (tmp_path / "b.whl").read_bytes().replace(b"x" * 1000, b"y" * 1000)
    (tmp_path / "b.whl").write_bytes(damaged)
    with pytest.raises(DataError, match="CRC"):
        extract_member(tmp_path / "b.whl", "text", tmp_path / "in")
    assert [p for p in (tmp_path / "in").rglob("*") if p.is_file()] == []


def test_every_asset_is_pinned():
    """Catches an asset without a version, a whole sha256 or a licence."""
    for asset in ASSETS.values():
        assert asset.package and asset.version and asset.licence and asset.nbytes > 0
        assert len(bytes.fromhex(asset.sha256)) == 32


def _asset(index, member="tinytext/data/text.db", sha256=None):
    wheel = next(index.iterdir()).read_bytes()
    digest = sha256 or hashlib.sha256(wheel).hexdigest()
    return AssetSource("tinytext", "1.0", member, digest, len(wheel), "none")


def _only_index(monkeypatch, **settings):
    """pip without the settings of the machine: nothing can be downloaded from anywhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
