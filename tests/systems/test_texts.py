"""The texts that the shipped systems ask for exist, at the sizes of their own files."""

import pytest

from moejax.config import load_config
from moejax.files import find_resource
from moejax.jobs.recover import texts
from moejax.jobs.study import Study

_FOLDER = find_resource("configs", "systems")
_FILES = sorted(_FOLDER.glob("*/*.gin"))


@pytest.mark.parametrize("file", _FILES, ids=[f.stem for f in _FILES])
def test_every_text_of_a_study_is_there(file):
    """Catches a file that only ever ran with a test's smaller texts, and stops for any user."""
    job = load_config(file).job()
    if not isinstance(job, Study):
        pytest.skip("no study")
    asked = [job.text, job.calibration]
    asked += [text for arm in job.arms for text in texts(arm.recipe)]
    for text in dict.fromkeys(asked):
        for group in text.corpus.groups:
            assert text.documents(group)
