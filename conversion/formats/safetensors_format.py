"""The home format: `model.safetensors`, in shards or not."""

import os
from collections.abc import Sequence
from pathlib import Path

from conversion.formats.base import CanonicalFormat, Output
from idefics_common.checkpoint.hub import CANONICAL_WEIGHTS
from idefics_common.checkpoint.safetensors_writer import safetensors_header


class SafetensorsFormat(CanonicalFormat):
    """See `conversion.formats.base.Format`."""

    name = "safetensors"
    stem, ending, index_ending = "model", ".safetensors", ".safetensors.index.json"
    hub_patterns = CANONICAL_WEIGHTS[0]

    def lay_out_file(self, path: Path, outputs: Sequence[Output], is_whole: bool) -> dict[str, int]:
        header = safetensors_header({output.name: output for output in outputs})
        offsets, end = {}, len(header)
        for output in outputs:
            offsets[output.name] = end
            end += output.nbytes
        with open(path, "xb") as file:
            file.write(header)
            os.ftruncate(file.fileno(), end)
        return offsets
