# SPDX-License-Identifier: Apache-2.0
"""Secrets, such as `HF_TOKEN` for gated models: the one place that reads them. They are never printed or recorded."""

import os
import sys
from importlib.util import find_spec


def read_secret(name: str) -> str | None:
    """The secret `name` from the environment, else from Colab's or Kaggle's own secrets; None where nobody has it.

    What the platform has and does not give (access not granted, the page closed, no Internet) is said on stderr and
    counts as nothing: most of what is downloaded is public. Colab answers in the kernel's main thread only.
    """
    if value := os.environ.get(name):
        return value
    try:
        if "google.colab" in sys.modules:  # its kernel has it loaded; a kernel that papermill starts there has no page
            from google.colab import userdata

            return userdata.get(name) or None
        if find_spec("kaggle_secrets"):
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret(name) or None
    except Exception as error:  # each platform has its own classes, one of them for "there is no such secret"
        if type(error).__name__ not in ("SecretNotFoundError", "NotFoundError"):
            print(f"maxkit: the secret {name} could not be read ({type(error).__name__})", file=sys.stderr)
    return None
