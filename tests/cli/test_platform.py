"""Which platform JAX may start."""

from __future__ import annotations

import importlib.util

import pytest

from moejax.cli.platform import choose_platform, one_blas_thread


@pytest.mark.parametrize(
    ("devices", "libtpu", "environ", "chosen"),
    [
        ([], True, {}, "cpu"),
        (["vfio/vfio"], True, {}, "cpu"),  # the control node alone is no TPU
        ([], False, {}, None),
        (["accel0"], True, {}, None),
        (["vfio/0"], True, {}, None),
        (["nvidia0"], True, {}, None),
        ([], True, {"JAX_PLATFORMS": "tpu"}, "tpu"),
        ([], True, {"JAX_PLATFORMS": ""}, ""),
    ],
)
def test_cpu_is_chosen_only_for_libtpu_without_a_device(
    tmp_path, monkeypatch, devices, libtpu, environ, chosen
):
    """Catches an attached TPU or GPU that is ignored, and a user's choice overridden."""
    for device in devices:
        (tmp_path / device).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / device).touch()
    found = importlib.util.find_spec("json") if libtpu else None
    monkeypatch.setattr("moejax.cli.platform.importlib.util.find_spec", lambda name: found)
    choose_platform(environ, tmp_path)
    assert environ.get("JAX_PLATFORMS") == chosen


def test_blas_gets_one_thread_unless_the_user_chose():
    """Catches BLAS threads that spin against XLA's, and a user's choice overridden."""
    environ, chosen = {}, {"OPENBLAS_NUM_THREADS": "4"}
    one_blas_thread(environ)
    one_blas_thread(chosen)
    assert environ == {"OPENBLAS_NUM_THREADS": "1"} and chosen["OPENBLAS_NUM_THREADS"] == "4"
