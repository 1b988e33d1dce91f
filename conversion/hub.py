"""Checkpoints from the Hugging Face hub, through huggingface_hub with its cache and its progress bar."""

from pathlib import Path

from conversion.errors import ConversionError

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
"""What may lie beside the tensors and goes along: configuration, generation configuration, tokenizer, processor."""

_WEIGHTS = (
    ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ("model*.weights.h5", "model.weights.json"),
    ("tf_model*.h5", "tf_model.h5.index.json"),
)


def looks_like_hub_id(source: str) -> bool:
    """Whether a source that is no path can be the id of a repository: NAME or OWNER/NAME."""
    parts = source.split("/")
    return len(parts) <= 2 and all(part and part.strip(".") and not part.startswith("~") for part in parts)


def download(repo_id: str) -> Path:
    """Download a checkpoint, in the first format that the repository has; returns the directory in the cache.

    Raises ConversionError if the hub does not know the id, cannot be reached, or has no checkpoint there.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for patterns in _WEIGHTS:
            directory = Path(snapshot_download(repo_id, allow_patterns=[*COMPANIONS, *patterns]))
            if any(path.match(pattern) for path in directory.iterdir() for pattern in patterns):
                return directory
    except HFValidationError as error:
        raise ConversionError(f"{repo_id}: no such file or directory, and no id of a repository either") from error
    except LocalEntryNotFoundError as error:
        raise ConversionError(
            f"{repo_id}: no such file or directory; as the id of a repository it is not in the cache, and the hub "
            "cannot be reached (or HF_HUB_OFFLINE is set)"
        ) from error
    except HfHubHTTPError as error:
        raise ConversionError(f"{repo_id}: no such file or directory, and the hub says: {error}") from error
    except OSError as error:
        raise ConversionError(
            f"{repo_id}: no such file or directory, and the hub cannot be reached: {error}"
        ) from error
    raise ConversionError(f"{repo_id}: the repository holds no checkpoint of a known format")
