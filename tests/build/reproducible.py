"""Builds the wheel from the source archive in two folders, without network, and compares the bytes.

    make sdist && python tests/build/reproducible.py dist/lomo_kernels-*.tar.gz

The folders have names of different lengths, the builds different umasks, temporary folders and numbers of compilers.
The Python that runs this needs setuptools>=77, cmake, ninja and a torch, as any build without isolation. LOMO_CUDA=1
builds the CUDA library too. As root, the builds run in a network namespace that has no device.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path


def build(archive: Path, folder: Path, umask: int, jobs: int) -> Path:
    """The wheel."""
    folder.mkdir(parents=True)
    with tarfile.open(archive) as sources:
        sources.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    (folder / "temporary").mkdir()
    offline = ["unshare", "--net"] if os.geteuid() == 0 and shutil.which("unshare") else []
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "wheel", "--no-deps", "--no-index"]
    env = {
        **os.environ,
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "SOURCE_DATE_EPOCH": os.environ.get("SOURCE_DATE_EPOCH", "1700000000"),
        "LOMO_CUDA": os.environ.get("LOMO_CUDA", "0"),
        "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs),
        "TMPDIR": str(folder / "temporary"),
    }
    command = [*offline, *pip, "--no-build-isolation", "-w", folder / "wheel", "."]
    subprocess.run(command, cwd=root, env=env, umask=umask, check=True)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def main() -> int:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as temporary:
        folders = Path(temporary, "a"), Path(temporary, "quite another folder", "b")
        wheels = [build(Path(sys.argv[1]), folders[0], 0o022, 2), build(Path(sys.argv[1]), folders[1], 0o077, 1)]
        digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
        for wheel, digest in zip(wheels, digests, strict=True):
            print(f"{digest}  {wheel.name}  {wheel.stat().st_size} bytes")
        if digests[0] == digests[1]:
            print("The wheels have the same bytes.")
            return 0
        first, second = (zipfile.ZipFile(wheel) for wheel in wheels)
        names = sorted({*first.namelist(), *second.namelist()})
        print("These differ:", *(n for n in names if n not in first.namelist() or n not in second.namelist()
                                 or first.read(n) != second.read(n)), sep="\n  ")  # fmt: skip
        return 1


if __name__ == "__main__":
    sys.exit(main())
