"""The files beside the tensors that are copied along: configurations, tokenizer, processor."""

import json
import os
import shutil
from pathlib import Path

from idefics_common.checkpoint.files import refuse_outside
from idefics_common.checkpoint.strict_json import parse_json_object

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
"""Their names."""


def copy_companions(source: Path, target: Path, dtype: str | None) -> None:
    """Copy these files byte by byte, but for the dtype in config.json where tensors were cast.

    Args:
        dtype: what the tensors were cast to, or None.

    Raises CheckpointError for a link that leads out of the directory.
    """
    for name in COMPANIONS:
        if os.path.lexists(source / name):
            shutil.copyfile(refuse_outside(source, name), target / name)
    if dtype is not None:
        config = target / "config.json"
        values = parse_json_object(config.read_bytes())
        values |= {field: dtype for field in ("dtype", "torch_dtype") if field in values}
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
