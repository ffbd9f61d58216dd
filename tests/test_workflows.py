"""The workflows of GitHub Actions run what the documents say, and name targets, files and versions that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = ROOT / ".github" / "workflows"
yaml = pytest.importorskip("yaml")

if not WORKFLOWS.exists():
    pytest.skip("the source archive has no workflows", allow_module_level=True)

NAMES = sorted(path.name for path in WORKFLOWS.glob("*.yml"))
PROJECT = (ROOT / "pyproject.toml").read_text()


def load(name):
    return yaml.safe_load((WORKFLOWS / name).read_text())


def commands(job):
    return [step["run"] for step in job["steps"] if "run" in step]


def all_commands(workflow):
    return [command for job in workflow["jobs"].values() for command in commands(job)]


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_they_run_the_commands_of_the_documents():
    developing = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for target in ("make test", "make lint"):
        assert target in developing
        assert any(command.startswith(target) for command in all_commands(load("tests.yml")))
    built = " ".join(all_commands(load("wheels.yml")))
    assert all(f"make {target} " in built for target in ("wheel", "wheel-cuda", "sdist"))


@pytest.mark.parametrize("name", NAMES)
def test_targets_and_files_exist(name):
    makefile = (ROOT / "Makefile").read_text()
    for command in all_commands(load(name)):
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert re.search(rf"^{target}:", makefile, re.M), command
        for setting in re.findall(r"\bmake [^\n]*?([A-Z]+)=", command):
            assert re.search(rf"^{setting} \?=", makefile, re.M), command
        for path in re.findall(r"[\w./]+\.py\b", command):
            assert (ROOT / path).is_file(), command


@pytest.mark.parametrize("name", NAMES)
def test_jobs_may_read_and_only_a_release_may_write(name):
    workflow = load(name)
    assert workflow["permissions"] == {"contents": "read"}
    for job_name, job in workflow["jobs"].items():
        if "permissions" in job:
            assert (name, job_name) == ("wheels.yml", "release")
        assert not [c for c in commands(job) if re.search(r"\$\{\{ *github\.(event|head_ref)", c)]  # others' text


def test_a_release_has_the_wheels_that_were_tested():
    jobs = load("wheels.yml")["jobs"]
    assert jobs["release"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert set(jobs["release"]["needs"]) == {"build", "matrix"} and jobs["matrix"]["needs"] == "build"
    assert re.search(r"gh release create .* dist/\*", commands(jobs["release"])[-1])
    names = [job["steps"][i]["with"]["name"] for job in jobs.values() for i, s in enumerate(job["steps"]) if
             s.get("uses", "").startswith(("actions/upload-artifact", "actions/download-artifact"))]  # fmt: skip
    assert len(names) == 3 and len(set(names)) == 1


def test_they_cover_the_versions_that_the_project_names():
    """The oldest and newest torch of the range, and every Python of the classifiers."""
    pairs = load("wheels.yml")["jobs"]["matrix"]["strategy"]["matrix"]["include"]
    pythons = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    assert sorted(pair["python"] for pair in pairs) == sorted(pythons)
    oldest, above = re.search(r'dependencies = \["torch>=([\d.]+),<([\d.]+)"\]', PROJECT).groups()
    torches = sorted(numbers(pair["torch"])[:2] for pair in pairs)
    assert torches[0] == numbers(oldest) and torches[-1] == (numbers(above)[0], numbers(above)[1] - 1)
    image = load("wheels.yml")["jobs"]["build"]["container"]
    assert "manylinux_2_28" in image and "manylinux_2_28" in (ROOT / "Makefile").read_text()
    tested = load("tests.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tested[0] == pythons[0] and len(tested) > 1 and set(tested[1:]) <= set(pythons[1:])
