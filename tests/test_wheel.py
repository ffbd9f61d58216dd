"""The wheel, the source archive and the Hub's kernel repository, as someone would get them."""

import base64
import email
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / "wheel-tests"
#: What every Linux has, and torch, which has loaded its library before ours.
LIBRARIES = {"libtorch_cpu.so", "libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
LIBRARIES |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
#: In git, and of no use without it or the site that has it.
NOT_IN_SDIST = (".gitignore", ".ci/", ".github/")
LINK = re.compile(r"!?\[[^][]*\]\(([^)\s]+)\)")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="wheels are built for Linux"),
    pytest.mark.timeout(1200),  # of which a build without objects of an earlier one takes a minute of each core
]


def need(*modules):
    """Skips without these; continuous integration has them, or the test fails."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        assert not os.environ.get("CI"), f"continuous integration lacks {missing}"
        pytest.skip(f"THE WHEEL IS NOT CHECKED: {', '.join(missing)} is missing (`pip install -e '.[wheel]'`)")


def run(*command, cwd=ROOT, umask=-1, **env):
    """Output of a Python module or a program. Programs of this environment are found though it is not activated."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "LOMO_CUDA": "0", "SOURCE_DATE_EPOCH": "1700000000", **env}
    process = subprocess.run(command, cwd=cwd, env=env, umask=umask, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def build(to, **options):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", "-w", to, ".", **options)
    (wheel,) = to.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel():
    """Built once for all workers of pytest-xdist, and from the objects of the installation if there are any."""
    need("setuptools", "cmake", "ninja")
    folder = BUILT / os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    BUILT.mkdir(parents=True, exist_ok=True)
    with open(BUILT / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not any(folder.glob("*.whl")):
            for earlier in filter(Path.is_dir, BUILT.iterdir()):
                shutil.rmtree(earlier)
            build(folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def library(wheel):
    """_cpu.so, read by pyelftools, which auditwheel brings."""
    need("elftools")
    from elftools.elf.elffile import ELFFile

    with zipfile.ZipFile(wheel) as archive, archive.open("lomo_kernels/_cpu.so") as file:
        yield ELFFile(file)


@pytest.fixture(scope="session")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return email.message_from_string(archive.read(name).decode())


def test_it_runs_on_every_system_that_torch_runs_on(wheel, tmp_path):
    """auditwheel reads which versions of glibc and libstdc++ it asks for, and refuses if they are newer."""
    need("auditwheel")
    platform = f"manylinux_2_28_{os.uname().machine}"
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", platform, "--only-plat", "--exclude", "libtorch*",
        "-w", tmp_path, wheel)  # fmt: skip
    (repaired,) = tmp_path.iterdir()
    assert repaired.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(repaired) as archive, zipfile.ZipFile(wheel) as before:
        assert archive.read("lomo_kernels/_cpu.so") == before.read("lomo_kernels/_cpu.so")  # nothing was bundled
        assert not [name for name in archive.namelist() if ".libs/" in name]


def test_it_links_torch_and_the_system_and_has_no_path(library):
    tags = list(library.get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    assert "libtorch_cpu.so" in needed and needed <= LIBRARIES
    assert not {tag.entry.d_tag for tag in tags} & {"DT_RPATH", "DT_RUNPATH"}


def test_it_exports_what_the_loader_calls_and_has_no_openmp(library):
    symbols = list(library.get_section_by_name(".dynsym").iter_symbols())
    exported = {s.name for s in symbols if s.entry.st_shndx != "SHN_UNDEF" and s.name}
    assert exported == {"lomo_kernels_isa"}
    imported = {s.name for s in symbols if s.entry.st_shndx == "SHN_UNDEF" and s.name}
    assert "torch_library_impl" in imported  # torch's stable ABI is C: no mangled name is of torch
    assert not [name for name in imported if re.match(r"(GOMP|omp|__kmpc|kmp)_", name)]
    assert not [name for name in imported if name.startswith("_Z") and re.search(r"c10|2at|5torch|caffe2", name)]


def test_another_build_has_the_same_bytes(wheel, tmp_path):
    again = build(tmp_path, umask=0o077)
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_it_does_not_say_who_built_it(wheel):
    """The builder's folders would be in the bytes. tests/build/reproducible.py builds in two folders and compares."""
    import torch

    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            for folder in (ROOT, Path(torch.__file__).parent, Path.home()):
                assert str(folder).encode() not in content or str(folder) in ("/", "/root"), (name, folder)
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_it_has_the_package_and_nothing_else(wheel):
    tracked = set(run("git", "ls-files", "lomo_kernels").split()) if (ROOT / ".git").exists() else None
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        assert [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert "lomo_kernels/_cpu.so" in files and "lomo_kernels/_cuda.so" not in files
    if tracked is not None:
        assert files == tracked | {"lomo_kernels/_cpu.so"}


def test_twine_and_check_wheel_contents_find_nothing(wheel):
    need("twine", "check_wheel_contents")
    assert "PASSED" in run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", wheel)
    assert f"{wheel}: OK" in run(sys.executable, "-m", "check_wheel_contents", "--no-config", wheel)


def test_the_metadata_are_complete(metadata):
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
    assert not [c for c in metadata.get_all("Classifier") if c.startswith("License ::")]
    assert metadata["Requires-Python"] == ">=3.10"
    urls = dict(url.split(", ") for url in metadata.get_all("Project-URL"))
    assert urls.keys() >= {"Source", "Documentation", "Changelog", "Issues"}
    (torch,) = (r for r in metadata.get_all("Requires-Dist") if re.match(r"torch\b(?!-)", r) and "extra" not in r)
    assert ">=2.11" in torch and "<" in torch


def test_links_of_the_long_description_are_absolute(metadata):
    source = next(url.split(", ")[1] for url in metadata.get_all("Project-URL") if url.startswith("Source"))
    readme = (ROOT / "README.md").read_text()
    text = metadata.get_payload()
    links, originals = LINK.findall(text), LINK.findall(readme)
    assert len(links) == len(originals) > 10
    for link, original in zip(links, originals, strict=True):
        if "://" in original or original.startswith("#"):
            assert link == original
        else:
            kind = "raw" if f"![{link}" in text or original.endswith(".svg") else "blob"
            assert link == f"{source}/{kind}/v{metadata['Version']}/{original}"
    assert LINK.sub("", text) == LINK.sub("", readme)


def test_the_source_archive_has_every_source_and_the_same_bytes(tmp_path):
    need("setuptools")
    code = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    archives = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(sys.executable, "-c", code, tmp_path / name)
        archives += (tmp_path / name).iterdir()
    first, second = archives
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as archive:
        members = archive.getmembers()
        assert all((m.uid, m.uname, m.mtime) == (0, "", 1700000000) for m in members)
        files = {m.name.partition("/")[2] for m in members if m.isfile()}
    made = {name for name in files if name.startswith("lomo_kernels.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    if (ROOT / ".git").exists():
        tracked = set(run("git", "ls-files").split())
        new = set(run("git", "ls-files", "--others", "--exclude-standard").split())  # of whoever works here
        assert files - made - new == {name for name in tracked if not name.startswith(NOT_IN_SDIST)}


# ---- The Hugging Face Hub -------------------------------------------------------------------------------------------

LOAD = """
import importlib.util, json, sys
from pathlib import Path
import torch
variant = Path(sys.argv[1])
name = json.loads((variant / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, variant / sys.argv[2])
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
model = torch.nn.Linear(4, 2)
before = model.weight.detach().clone()
optimizer = module.Lomo(model, lr=0.1, clip_grad_norm=1.0)
optimizer.backward(model(torch.ones(3, 4)).sum())
assert not torch.equal(model.weight, before)
from lomo_kernels import backends
print(backends.CPU_LIBRARY, backends.choice("CPU").backend)
"""


@pytest.fixture(scope="module")
def make_repository():
    return runpy.run_path(str(ROOT / "hub" / "make_repository.py"))


@pytest.fixture(scope="module")
def variant(wheel, make_repository, tmp_path_factory):
    """A kernel repository's folder for CPUs."""
    return make_repository["lay_out"](wheel, tmp_path_factory.mktemp("hub"))


def test_the_kernel_repository_is_as_the_hub_wants_it(wheel, variant):
    """https://huggingface.co/docs/kernels/kernel-requirements; checked by kernels-data and kernel-abi-check too."""
    assert variant.parent.name == "build" and variant.name == f"torch-stable-abi211-cpu-{os.uname().machine}-linux"
    metadata = json.loads((variant / "metadata.json").read_text())
    hashes = metadata.pop("digest")
    assert metadata == {
        **{"name": "lomo-kernels", "id": "lomo_kernels", "version": 0, "license": "Apache-2.0"},
        "upstream": "https://github.com/lomo-kernels/lomo_kernels",
        **{"python-depends": [], "backend": {"type": "cpu"}},
    }
    files = {str(p.relative_to(variant)) for p in variant.rglob("*") if p.is_file()} - {"metadata.json"}
    assert hashes["algorithm"] == "sha256" and set(hashes["files"]) == files
    for name, expected in hashes["files"].items():
        assert base64.b64decode(expected) == hashlib.sha256((variant / name).read_bytes()).digest()
    with zipfile.ZipFile(wheel) as archive:
        package = {n.partition("/")[2] for n in archive.namelist() if ".dist-info/" not in n and not n.endswith("/")}
    assert files == package | {"lomo_kernels/__init__.py"}


@pytest.mark.parametrize("start", ["__init__.py", "lomo_kernels/__init__.py"])
def test_the_kernel_is_loaded_from_its_folder(variant, start, run_python):
    """As `kernels` loads it: a module of the kernel's id, from a path that Python does not search. It trains."""
    process = run_python(LOAD, str(variant), start)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [str(variant / "_cpu.so"), "cpu"]


def test_a_wheel_for_gpus_says_which(make_repository, wheel, tmp_path):
    """From what the library says of itself; this one has the words and no code."""
    words = b"\0sm_75 sm_90 sm_100 sm_120 compute_120\0Build cuda_13.0.r13.0/compiler.1_0\0"
    for_gpus = tmp_path / wheel.name.replace("-py3-", "-1cuda-py3-")
    shutil.copy(wheel, for_gpus)
    with zipfile.ZipFile(for_gpus, "a") as archive:
        archive.writestr("lomo_kernels/_cuda.so", words)
    variant = make_repository["lay_out"](for_gpus, tmp_path / "hub")
    assert variant.name == f"torch-stable-abi211-cu130-{os.uname().machine}-linux"
    backend = json.loads((variant / "metadata.json").read_text())["backend"]
    assert backend == {"type": "cuda", "archs": ["7.5", "9.0", "10.0", "12.0+PTX"]}
