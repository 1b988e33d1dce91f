"""Checkpoints from the Hugging Face hub, through huggingface_hub with its cache and its progress bar."""

from collections.abc import Iterable
from pathlib import Path

from idefics_common.checkpoint.errors import CheckpointError

CANONICAL_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
)
"""Patterns of the files of tensors that both rooms read, format by format, best first."""


def download(
    repo_id: str, beside: Iterable[str], weights: Iterable[tuple[str, ...]], subfolder: str = "", **options
) -> Path:
    """Download a checkpoint, in the first format that the repository has, or find it in the cache.

    Args:
        repo_id: NAME or OWNER/NAME. It is what a user gave where no file of that name is.
        beside: names of the files wanted beside the tensors; those that are not there are done without.
        weights: patterns of the files of tensors, format by format, best first.
        subfolder: where in the repository they are.
        options: see `huggingface_hub.snapshot_download`.

    Returns:
        the directory in the cache that holds them.

    Raises CheckpointError if the hub does not know the id, cannot be reached, or has no checkpoint there.
    """
    if not looks_like_hub_id(repo_id):
        raise CheckpointError(repo_id, "no such file or directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    prefix = f"{subfolder}/" if subfolder else ""
    weights = list(weights)
    try:
        for patterns in weights:
            wanted = [prefix + name for name in (*beside, *patterns)]
            directory = Path(snapshot_download(repo_id, allow_patterns=wanted, **options), subfolder)
            if any(any(directory.glob(pattern)) for pattern in patterns):
                return directory
    except HFValidationError as error:
        problem, cause = "no id of a repository either", error
    except LocalEntryNotFoundError as error:
        problem, cause = "as the id of a repository it is not in the cache, and the hub cannot be reached", error
        problem += " (or HF_HUB_OFFLINE is set)"
    except HfHubHTTPError as error:
        problem, cause = f"the hub says: {error}", error
    except OSError as error:
        problem, cause = f"the hub cannot be reached: {error}", error
    else:
        looked_for = ", ".join(pattern for patterns in weights for pattern in patterns)
        raise CheckpointError(repo_id, f"the repository holds no checkpoint: looked for {looked_for}")
    raise CheckpointError(repo_id, f"no such file or directory; {problem}") from cause


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is no path can be the id of a repository: NAME or OWNER/NAME."""
    parts = source.split("/")
    return len(parts) <= 2 and all(part and part.strip(".") and not part.startswith("~") for part in parts)
