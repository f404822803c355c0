# SPDX-License-Identifier: Apache-2.0
"""Secrets: the environment first, then what Colab and Kaggle give, through modules that answer as theirs do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COLAB = """\
class SecretNotFoundError(Exception): ...
class NotebookAccessError(Exception): ...
class TimeoutException(Exception): ...

def get(key):
    raise_or_value = {"HF_TOKEN": "of-colab", "EMPTY": "", "DENIED": NotebookAccessError(key)}
    found = raise_or_value.get(key, SecretNotFoundError(key))
    if isinstance(found, Exception):
        raise found
    return found
"""
KAGGLE = """\
class NotFoundError(Exception): ...
class BackendError(Exception): ...

class UserSecretsClient:
    def get_secret(self, label):
        if label == "HF_TOKEN":
            return "of-kaggle"
        raise NotFoundError(label) if label == "NONE" else BackendError("No user secrets exist.")
"""


def read(name: str, folder: Path, before: str = "", **environment: str) -> tuple[str, str]:
    """(the secret's repr, stderr) as a fresh Python with `folder` on its path reads it."""
    code = f"{before}\nfrom maxkit.secret import read_secret\nprint(repr(read_secret({name!r})))"
    given = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | environment
    paths = [str(folder), str(Path(__file__).parents[2])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=given | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip(), done.stderr.strip()


@pytest.fixture
def colab(tmp_path):
    package = tmp_path / "google" / "colab"  # as there: `google` itself is shared with other packages
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "userdata.py").write_text(COLAB)
    return tmp_path


@pytest.fixture
def kaggle(tmp_path):
    (tmp_path / "kaggle_secrets.py").write_text(KAGGLE)
    return tmp_path


def test_elsewhere_only_the_environment_has_it(tmp_path):
    assert read("HF_TOKEN", tmp_path) == ("None", "")
    assert read("HF_TOKEN", tmp_path, HF_TOKEN="given") == ("'given'", "")


def test_in_colab(colab):
    kernel = "import google.colab"  # Colab's kernel does it before the first cell
    assert read("HF_TOKEN", colab, kernel) == ("'of-colab'", "")
    assert read("HF_TOKEN", colab, kernel, HF_TOKEN="given") == ("'given'", "")
    assert read("NONE", colab, kernel) == read("EMPTY", colab, kernel) == ("None", "")
    refused = "maxkit: the secret DENIED could not be read (NotebookAccessError)"
    assert read("DENIED", colab, kernel) == ("None", refused)


def test_in_a_kernel_that_is_not_colabs_own_its_page_is_not_asked(colab):
    assert read("HF_TOKEN", colab) == ("None", "")


def test_in_kaggle(kaggle):
    assert read("HF_TOKEN", kaggle) == ("'of-kaggle'", "")
    assert read("HF_TOKEN", kaggle, HF_TOKEN="given") == ("'given'", "")
    assert read("NONE", kaggle) == ("None", "")
    assert read("OTHER", kaggle) == ("None", "maxkit: the secret OTHER could not be read (BackendError)")
