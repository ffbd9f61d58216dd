"""Lays a wheel out as a kernel repository of the Hugging Face Hub, which its library `kernels` loads.

    make wheel && python hub/make_repository.py dist/lomo_kernels-*.whl build/hub

A wheel for CPUs becomes the variant `torch-stable-abi211-cpu-<machine>-linux`, one with kernels for GPUs the variant
`torch-stable-abi211-cu<version>-<machine>-linux`. "211" is the oldest torch that the library's stable ABI serves.
Several wheels may go into one repository. The Hub's own builder compiles each source once. Ours are compiled once per
instruction set: so CMake builds the wheels, and they are only laid out here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "lomo_kernels"  # also the namespace of the operators, which the Hub wants to be the kernel's id
#: Older versions of `kernels` look for the package in a folder of its name.
COMPATIBILITY = '''"""As the folder above."""

import importlib.util
import sys
from pathlib import Path

if "lomo_kernels" not in sys.modules or Path(sys.modules["lomo_kernels"].__file__).parent == Path(__file__).parent:
    _above = Path(__file__).parents[1] / "__init__.py"
    _spec = importlib.util.spec_from_file_location("lomo_kernels", _above)
    sys.modules["lomo_kernels"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["lomo_kernels"])
globals().update(vars(sys.modules["lomo_kernels"]))
'''


def gpus(library: bytes) -> list[str]:
    """The compute capabilities that _cuda.so has code for, as the Hub writes them: "9.0", and "12.0+PTX" at the end."""
    targets = re.search(rb"((?:sm_\d+ )+compute_\d+)\0", library)
    if not targets:
        sys.exit("_cuda.so does not say which GPUs it has code for: csrc/cuda/targets.cpp writes that.")
    numbers = re.findall(r"sm_(\d+)(\d)", targets[1].decode())
    return [f"{major}.{minor}" for major, minor in numbers[:-1]] + [f"{numbers[-1][0]}.{numbers[-1][1]}+PTX"]


def cuda_version(library: bytes) -> str:
    """Of the static runtime in it, which knows the nvcc that it came with."""
    version = re.search(rb"cuda_(\d+)\.(\d+)\.r", library) or re.search(rb"CUDART_STATIC_(\d+)\.(\d+)", library)
    if not version:
        sys.exit("_cuda.so does not say of which CUDA it is.")
    return version[1].decode() + version[2].decode()


def lay_out(wheel: Path, repository: Path) -> Path:
    """Writes one variant into `repository` and returns its folder."""
    name = re.fullmatch(rf"{PACKAGE}-(\d+)\.[^-]+(?:-\d\w*)?-py3-none-.*_(x86_64|aarch64)\.whl", wheel.name)
    if not name:
        sys.exit(f"{wheel.name} is no wheel of {PACKAGE} for Linux: `make wheel` builds one.")
    with zipfile.ZipFile(wheel) as archive:
        files = [n for n in archive.namelist() if n.startswith(f"{PACKAGE}/") and not n.endswith("/")]
        content = {n.partition("/")[2]: archive.read(n) for n in files}
        (about,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    backend: dict[str, object] = {"type": "cpu"}
    build = "cpu"
    if "_cuda.so" in content:
        backend = {"type": "cuda", "archs": gpus(content["_cuda.so"])}
        build = f"cu{cuda_version(content['_cuda.so'])}"
    variant = repository / "build" / f"torch-stable-abi211-{build}-{name[2]}-linux"
    shutil.rmtree(variant, ignore_errors=True)
    content[f"{PACKAGE}/__init__.py"] = COMPATIBILITY.encode()
    for path, data in content.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_bytes(data)
    hashes = {path: base64.b64encode(hashlib.sha256(content[path]).digest()).decode() for path in sorted(content)}
    metadata = {
        "name": PACKAGE.replace("_", "-"),  # the Hub allows no underscore here
        "id": PACKAGE,
        "version": int(name[1]),
        "license": "Apache-2.0",
        "upstream": re.search(r"^Project-URL: Source, (.+)$", about, re.M)[1],
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    *wheels, repository = map(Path, sys.argv[1:])
    for wheel in wheels:
        print(lay_out(wheel, repository))
    shutil.copy(HERE / "card.md", repository / "README.md")


if __name__ == "__main__":
    main()
