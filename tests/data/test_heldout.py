"""The shipped held-out sample: its size, its origin, and that nothing of it can be trained on."""

import json

import pytest

from moejax.core.errors import DataError
from moejax.data import HELDOUT_BYTES, HeldoutSample, PipCorpus, heldout_text, split_of
from moejax.data.pip_corpus import APPLICATIONS_SHARE, DOCS_SHARE, LIBRARY_SHARE
from moejax.data.sources import module_family
from moejax.files import find_resource


@pytest.mark.parametrize("group", HeldoutSample.groups)
def test_sample_has_its_256_kib(group):
    """Catches a sample that was cut short or that outgrew the size all figures are quoted at."""
    size = len(heldout_text(HeldoutSample(), group).encode())
    assert HELDOUT_BYTES - 1024 < size <= HELDOUT_BYTES


@pytest.mark.parametrize("group", HeldoutSample.groups)
def test_sample_is_held_out_under_the_rules_of_today(group):
    """Catches a changed split that trains on units of the sample."""
    for path in _paths(group):
        unit, share = _unit(path)
        assert split_of(unit, share) == "heldout", path


def test_sample_has_no_training_split():
    """Catches a training run that gets evaluation text without a word."""
    with pytest.raises(DataError, match="no split 'train'"):
        list(HeldoutSample().documents("docs", "train"))


@pytest.mark.assets
@pytest.mark.parametrize("group", HeldoutSample.groups)
def test_sample_is_what_the_corpus_holds_out(group):
    """Catches a sample of an older build of the corpus (code: its packages that pip pins)."""
    built = {d.path: d.text for d in PipCorpus().named_documents(group, "heldout")}
    pinned = [path for path in _paths(group) if not path.startswith("python/")]
    texts = dict(zip(_paths(group), HeldoutSample().documents(group), strict=True))
    assert all(built[path].startswith(texts[path]) for path in pinned)


def _paths(group):
    lines = find_resource("assets", f"heldout/{group}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["path"] for line in lines.split("\n") if line]


def _unit(path):
    parts = path.split("/")
    if parts[0] == "botocore":
        name = path.partition("#")[2]
        return f"api/{parts[2] if name == 'service' else name}", DOCS_SHARE
    if parts[0] == "python":
        return f"library/{module_family(parts[1].removesuffix('.py'))}", LIBRARY_SHARE
    unit = parts[1:3] if parts[1] == "components" else parts[1:2]
    return "application/" + "/".join(unit), APPLICATIONS_SHARE
