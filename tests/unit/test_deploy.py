# SPDX-License-Identifier: Apache-2.0
"""Manifests for clusters, workflows of the public CI, publishing of the site: what is known without running them."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from maxkit.cli import build_parser
from maxkit.config import RECIPES, resolve
from maxkit.distributed import EXPLICIT

ROOT = Path(__file__).parent.parent.parent
JOBSETS = sorted((ROOT / "docs" / "deploy").glob("jobset-*.yaml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OLDEST = tuple(map(int, re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))


def read(path: Path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# --- Kubernetes ---


@pytest.fixture(params=JOBSETS, ids=lambda path: path.stem)
def jobset(request):
    return read(request.param)


def pods(jobset) -> tuple[dict, dict, dict]:
    """The job, its pod and the pod's one container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_the_command_line_of_a_manifest_is_accepted_and_divides(jobset):
    job, _, container = pods(jobset)
    command = [*container["command"], *container["args"]]
    assert command[0] == "maxkit"
    arguments = build_parser().parse_args(command[1:])
    given = {n: (v, "command line") for n, _, v in (text.partition("=") for text in arguments.parameters)}
    config = resolve(arguments.recipe, environ={}, given=given)
    chips = next(
        int(count) for name, count in container["resources"]["limits"].items() if name.endswith(("tpu", "gpu"))
    )
    rows = config.batch_size // config.gradient_accumulation_steps
    assert rows % (chips * job["parallelism"]) == 0
    # What is written lies on the volume that all pods have, and each pod has a notebook of its own.
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    environment = {entry["name"]: entry for entry in container["env"]}
    assert config.run_dir.startswith(mounts["runs"] + "/") and arguments.output.startswith(mounts["runs"] + "/")
    assert environment["MAXKIT_CACHE"]["value"].startswith(mounts["runs"] + "/")
    assert "$(POD_NAME)" in arguments.output and "POD_NAME" in environment


def test_the_parts_of_a_manifest_agree(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["kind"] == "JobSet"
    job, pod, container = pods(jobset)
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = read(ROOT / "docs" / "deploy" / "runs-volume.yaml")
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert container["image"].endswith(f":{PROJECT['version']}")


def test_a_tpu_slice_is_as_large_as_its_pods():
    job, pod, container = pods(read(ROOT / "docs" / "deploy" / "jobset-tpu.yaml"))
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert x * y == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]


def test_pods_with_gpus_are_told_of_each_other():
    manifest = read(ROOT / "docs" / "deploy" / "jobset-gpu.yaml")
    job, _, container = pods(manifest)
    told = {entry["name"]: entry for entry in container["env"] if entry["name"] in EXPLICIT}
    assert set(told) == set(EXPLICIT)
    name, replicated = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"][0]["name"]
    port = container["ports"][0]["containerPort"]
    assert told["JAX_COORDINATOR_ADDRESS"]["value"] == f"{name}-{replicated}-0-0.{name}:{port}"
    assert told["JAX_NUM_PROCESSES"]["value"] == str(job["parallelism"])
    assert "job-completion-index" in told["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]


def test_the_image_has_the_extras_and_python_of_the_project():
    text = (ROOT / "docs" / "deploy" / "Dockerfile").read_text()
    assert tuple(map(int, re.search(r"^FROM python:(\d+)\.(\d+)-slim$", text, re.M).groups())) >= OLDEST
    extras = {"notebooks", re.search(r"^ARG EXTRA=(\w+)$", text, re.M)[1]}
    assert extras <= set(PROJECT["optional-dependencies"])


# --- the public CI ---


def test_the_workflows_are_there():
    assert {path.stem for path in WORKFLOWS} == {"tests", "notebooks", "docs", "tpu"}


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request):
    return request.param


def steps(path: Path) -> list[dict]:
    return [step for job in read(path)["jobs"].values() for step in job["steps"]]


def test_actions_are_pinned_to_a_commit_with_its_version_beside(workflow):
    text = workflow.read_text(encoding="utf-8")
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    pinned = re.findall(r"uses: (actions/[a-z-]+@[0-9a-f]{40}) # v\d+\.\d+\.\d+$", text, re.M)
    assert used and used == pinned
    commits = {}
    for path in WORKFLOWS:
        for step in steps(path):
            if "uses" in step:
                name, _, commit = step["uses"].partition("@")
                assert commits.setdefault(name, commit) == commit, f"{name} in two versions"


def test_pythons_are_those_of_the_project(workflow):
    asked = [step["with"]["python-version"] for step in steps(workflow) if "python-version" in step.get("with", {})]
    assert all(isinstance(version, str) for version in asked)  # 3.10 without quotes would be 3.1
    assert all(tuple(map(int, version.split("."))) >= OLDEST for version in asked)
    if workflow.stem == "tests":
        assert f"{OLDEST[0]}.{OLDEST[1]}" in asked


def test_jobs_end_and_may_not_write(workflow):
    content = read(workflow)
    assert content["permissions"] == {"contents": "read"}
    for name, job in content["jobs"].items():
        assert job["timeout-minutes"] <= 120, name
        assert (
            "self-hosted" not in job["runs-on"] or content[True] == "workflow_dispatch"
        )  # YAML 1.1 reads `on` as true
    writing = [job for job in content["jobs"].values() if job.get("permissions", {}).get("contents") == "write"]
    assert bool(writing) == (workflow.stem == "docs")


def test_every_script_is_shell(workflow):
    for step in steps(workflow):
        if "run" in step:
            script = re.sub(r"\$\{\{.*?\}\}", "x", step["run"])
            done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert all((ROOT / named).is_file() for named in re.findall(r"(?:docs|tests)/[\w/]+\.py", script))


def test_the_matrices_hold_everything():
    targets = re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.M)
    assert set(read(ROOT / ".github/workflows/tests.yml")["jobs"]["make"]["strategy"]["matrix"]["target"]) <= set(
        targets
    )
    recipes = read(ROOT / ".github/workflows/notebooks.yml")["jobs"]["papermill"]["strategy"]["matrix"]["recipe"]
    assert sorted(recipes) == sorted(RECIPES)


def test_what_nobody_ran_says_so():
    assert "UNVERIFIED" in (ROOT / ".github" / "workflows" / "tpu.yml").read_text()
    for page in ("gpu", "tpu", "kubernetes", "colab"):
        assert "not measured" in (ROOT / "docs" / f"{page}.md").read_text(), page


# --- the site's versions ---


@pytest.fixture(scope="module")
def publishing():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "docs" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_version_has_its_folder_and_the_list_has_them_all(publishing, tmp_path):
    built, site = tmp_path / "html", tmp_path / "site"
    built.mkdir()
    site.mkdir()
    for ref, text in (
        ("refs/tags/v0.9.0", "nine"),
        ("refs/heads/main", "old"),
        ("refs/tags/v0.10.0", "ten"),
        ("refs/tags/v0.9.1", "nine again"),
    ):
        (built / "index.html").write_text(text)
        publishing.publish(built, site, ref)
        (site / "latest" / "gone.html").parent.mkdir(exist_ok=True)
        (site / "latest" / "gone.html").touch()
    (built / "index.html").write_text("new")
    assert publishing.publish(built, site, "refs/heads/main") == site / "latest"
    read = {folder.name: (folder / "index.html").read_text() for folder in site.iterdir() if folder.is_dir()}
    assert read == {"latest": "new", "v0.10": "ten", "v0.9": "nine again"}
    assert not (site / "latest" / "gone.html").exists() and (site / ".nojekyll").exists()
    links = re.findall(r'href="([^"]+)"', (site / "versions.html").read_text())
    assert links == ["latest/index.html", "v0.10/index.html", "v0.9/index.html"]
    assert "url=latest/index.html" in (site / "index.html").read_text()


def test_the_workflows_script_publishes_on_a_branch(tmp_path):
    """The script itself, in a clone of an empty repository on this disk: first without the branch, then on it."""
    (script,) = [step["run"] for step in steps(ROOT / ".github/workflows/docs.yml") if step.get("name") == "Publish"]
    origin, clone = tmp_path / "origin.git", tmp_path / "clone"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GIT_")},
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@example.org",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@example.org",
        "GITHUB_SHA": "0" * 40,
    }

    def shell(lines: str, cwd: Path = clone, **more: str) -> str:
        command = ["bash", "-e", "-o", "pipefail", "-c", lines]
        done = subprocess.run(command, cwd=cwd, env=environment | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    shell(f"git init -q --bare {origin} && git clone -q {origin} {clone}", tmp_path)
    shell(
        f"mkdir -p docs/_build/html .venv/bin; ln -s {sys.executable} .venv/bin/python; cp {ROOT}/docs/publish.py docs"
    )
    shell("git add docs/publish.py; git commit -q -m first; echo one > docs/_build/html/index.html")
    for ref in ("refs/heads/main", "refs/tags/v0.1.0", "refs/tags/v0.1.0"):  # the last one changes nothing
        shell(script, GITHUB_REF=ref)
        shell("git worktree remove --force site; git branch -q -D gh-pages")
    held = shell("git ls-tree -r --name-only gh-pages", origin).split()
    assert held == [".nojekyll", "index.html", "latest/index.html", "v0.1/index.html", "versions.html"]
    assert shell("git log --format=%s gh-pages", origin).count("refs/tags/v0.1.0") == 2


@pytest.mark.parametrize("ref", ["refs/heads/topic", "refs/tags/1.2.3", "refs/tags/v1.2", "refs/pull/7/merge"])
def test_nothing_else_is_published(publishing, tmp_path, ref):
    with pytest.raises(SystemExit, match="nothing is published"):
        publishing.publish(tmp_path, tmp_path, ref)
    assert not list(tmp_path.iterdir())
