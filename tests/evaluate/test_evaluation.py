"""The streamed pass: against brute force, in any batches, and its errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.core import ConfigError, DataError, MoejaxError, compat
from moejax.evaluate import evaluate, evaluation, specialisation
from moejax.evaluate.token_scores import predict
from tests.evaluate.conftest import (
    LENGTH,
    cut,
    dense,
    make_model,
    make_spec,
    padded,
    routed,
    run,
)

BYTES = {"docs": 300, "code": 150}
FIELDS = ("nll_sum", "bits_per_byte", "perplexity", "kl", "agreement", "delta_nll", "delta_stderr")


def _score(models, batches, base):
    return evaluate(models, batches, base=base, group_bytes=BYTES)


def _log_p(model, batch):
    logits = np.asarray(run(model, batch).logits_BxSxV, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_scores_are_those_of_brute_force(model, other, groups):
    """Catches targets off by one, windows lost at the end of a group, and groups mixed up."""
    found = _score({"base": model, "arm": other}, cut(groups, 3), {"arm": "base"})
    for number, (group, tokens) in enumerate(groups.items()):
        nll, delta, kl, agreed = [], [], [], []
        for batch in cut({group: tokens}, 1):
            own, before = _log_p(other, batch)[0], _log_p(model, batch)[0]
            for t, target in enumerate(batch.targets_BxS[0]):
                if batch.mask_BxS[0, t]:
                    nll.append(-own[t, target])
                    delta.append(before[t, target] - own[t, target])
                    kl.append(np.sum(np.exp(before[t]) * (before[t] - own[t])))
                    agreed.append(own[t].argmax() == before[t].argmax())
        score = found["arm"].domains[number]
        assert (score.group, score.tokens, score.bytes) == (group, len(tokens), BYTES[group])
        assert len(nll) == len(tokens)
        assert score.nll_sum == pytest.approx(sum(nll), rel=1e-5)
        assert score.kl == pytest.approx(np.mean(kl), rel=1e-5)
        assert score.agreement == pytest.approx(np.mean(agreed))
        assert score.delta_nll == pytest.approx(np.mean(delta), abs=1e-5)
        assert found["base"].domains[number].kl is None
    assert found["arm"].average.tokens == sum(map(len, groups.values()))


def test_batches_and_padding_change_nothing(model, other, groups):
    """Catches means of batch means, padding that counts, and padding that experts see."""
    models, base = {"base": model, "arm": other}, {"arm": "base"}
    wanted = _score(models, cut(groups, 1), base)
    ways = (cut(groups, 3), cut(groups, 8), [padded(b, 2, 5) for b in cut(groups, 3)])
    for batches in ways:
        found = _score(models, batches, base)
        for arm in models:
            pairs = zip(
                (*found[arm].domains, found[arm].average),
                (*wanted[arm].domains, wanted[arm].average),
                strict=True,
            )
            for mine, theirs in pairs:
                assert (mine.group, mine.tokens) == (theirs.group, theirs.tokens)
                for field in FIELDS:
                    # Logits come from matrix products of another shape: that is all that differs.
                    value = getattr(theirs, field)
                    near = None if value is None else pytest.approx(value, rel=2e-6, abs=2e-7)
                    assert getattr(mine, field) == near, field
            for group in groups:
                for mine, theirs in zip(
                    found[arm].assignments[group], wanted[arm].assignments[group], strict=True
                ):
                    np.testing.assert_array_equal(mine, theirs)


def test_a_copy_of_the_base_is_no_different_from_it(model, groups):
    """Catches a base that runs another program than the arms, which makes up small differences."""
    found = _score({"copy": make_model(0), "base": model}, cut(groups, 4), {"copy": "base"})
    score = found["copy"].average
    assert (score.kl, score.delta_nll, score.delta_stderr, score.agreement) == (0, 0, 0, 1)
    assert score.nll_sum == found["base"].average.nll_sum


def test_every_model_runs_once_per_batch(model, other, groups, monkeypatch):
    """Catches the base computed anew for every arm, and text read once per arm."""
    calls = []

    def counted(*args):
        calls.append(args[1])
        return predict(*args)

    monkeypatch.setattr(evaluation, "predict", counted)
    models = {"a": other, "b": make_model(2), "base": model, "alone": make_model(3)}
    batches = cut(groups, 4)
    found = _score(models, iter(batches), {"a": "base", "b": "base", "base": "alone"})
    assert len(calls) == len(batches) * len(models)
    assert list(found) == list(models)
    assert found["base"].average.kl > 0
    assert found["alone"].average.kl is None


def test_models_of_one_structure_compile_once(groups):
    """Catches a program per model, minutes each for a study of many arms."""
    spec = make_spec(routed(5))
    models = {name: make_model(seed, spec) for seed, name in enumerate("abc")}
    before = predict._cache_size()
    _score(models, cut(groups, 4), {"b": "a", "c": "a"})
    assert predict._cache_size() == before + 1


def test_assignments_are_the_routers(groups):
    """Catches counts of padding, and counts of one layer or group under another's name."""
    model = make_model(4, make_spec(dense(), routed(4)))
    found = _score({"base": model}, cut(groups, 4), {})["base"]
    for group, tokens in groups.items():
        counts = np.zeros(4, int)
        for batch in cut({group: tokens}, 1):
            routing = run(model, batch).routings[1]
            np.add.at(counts, np.asarray(routing.expert_A)[np.asarray(routing.valid_A)], 1)
        assert found.assignments[group][0] is None
        np.testing.assert_array_equal(found.assignments[group][1], counts)
        assert counts.sum() == 2 * len(tokens)
    shares = specialisation(found)
    assert shares[0] is None
    assert [sum(row) for row in shares[1]] == pytest.approx([1.0, 1.0])


def test_a_number_that_is_none_is_an_error(model, groups):
    """Catches NaN that is averaged away, and an error that does not say whose it is."""
    broken = make_model(1)
    norm = broken.final_norm.scale
    compat.write(norm, compat.read(norm).at[3].set(jnp.nan))
    with pytest.raises(MoejaxError, match=r"'broken'.*window 0 of batch 0 \(group 'docs'\)"):
        _score({"base": model, "broken": broken}, cut(groups, 4), {"broken": "base"})


def test_the_first_batch_does_not_count_for_speed(model, groups):
    """Catches compilation reported as a slow model."""
    found = _score({"base": model}, cut({"docs": groups["docs"][:LENGTH]}, 4), {})
    assert found["base"].average.tokens_per_second is None
    found = _score({"base": model}, cut(groups, 1), {})
    assert found["base"].average.tokens_per_second > 0


class _Bar:
    def __init__(self):
        self.steps = 0

    def advance(self, n=1, **facts):
        self.steps += n


def test_progress_counts_batches_and_arms(model, other, groups):
    """Catches a bar that stops short of its total."""
    bar, batches = _Bar(), cut(groups, 4)
    evaluate({"a": model, "b": other}, batches, base={"b": "a"}, group_bytes=BYTES, progress=bar)
    assert bar.steps == 2 * len(batches)


def test_arms_that_cannot_be_compared_are_refused(model, groups):
    """Catches a base that is silently none, an arm against itself, and two tokenizers."""
    batches, narrow = cut(groups, 4), make_model(0, make_spec(vocab=32))
    with pytest.raises(ConfigError, match="'bse'"):
        _score({"base": model, "arm": model}, batches, {"arm": "bse"})
    with pytest.raises(ConfigError, match="'gone'"):
        _score({"base": model}, batches, {"gone": None})
    with pytest.raises(ConfigError, match="another arm"):
        _score({"base": model}, batches, {"base": "base"})
    with pytest.raises(ConfigError, match="32"):
        _score({"base": model, "arm": narrow}, batches, {"arm": "base"})


def test_text_that_does_not_fit_is_refused(model, groups):
    """Catches ids that a gather clips in silence, and a division by bytes nobody gave."""
    with pytest.raises(DataError, match="'scripture'"):
        _score({"base": model}, cut({"scripture": groups["docs"]}, 4), {})
    with pytest.raises(DataError, match="vocabulary has 64"):
        _score({"base": model}, cut({"docs": groups["docs"] + 40}, 4), {})
    with pytest.raises(DataError, match="no text"):
        _score({"base": model}, [], {})
    empty = [b._replace(mask_BxS=np.zeros_like(b.mask_BxS)) for b in cut(groups, 4)]
    with pytest.raises(DataError, match="'docs' holds no token"):
        _score({"base": model}, empty, {})
