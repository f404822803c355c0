# SPDX-License-Identifier: Apache-2.0
"""What a notebook says of itself besides its cells: the kernel, and what Colab and Kaggle should give it."""

from typing import Any

from maxkit.config import RecipeEntry


def notebook_metadata(entry: RecipeEntry | None) -> dict[str, Any]:
    """The metadata of a recipe, or of a tutorial (None), without its stamp.

    A recipe that asks for an accelerator opens with a GPU where the reader has one to spend; it runs without. Kaggle
    gives no network unless told to, and the setup cell needs it.
    """
    gpu = entry is not None and entry.accelerator == "GPU"
    kaggle = {
        "accelerator": "nvidiaTeslaT4" if gpu else "none",
        "dataSources": [],
        "isGpuEnabled": gpu,
        "isInternetEnabled": True,
        "language": "python",
        "sourceType": "notebook",
    }
    found: dict[str, Any] = {"accelerator": "GPU", "colab": {"gpuType": "T4"}} if gpu else {}
    return found | {
        "kaggle": kaggle,
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
