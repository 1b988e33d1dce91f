"""The home format: `model.safetensors`, in shards or not."""

import os
from collections.abc import Sequence
from pathlib import Path

from conversion.formats.base import CanonicalFormat, Output
from idefics_common.checkpoint.safetensors_writer import safetensors_header


class SafetensorsFormat(CanonicalFormat):
    """See `conversion.formats.base.Format`."""

    name = "safetensors"
    directory_files = ("model.safetensors", "model.safetensors.index.json")
    stem, ending = "model", ".safetensors"

    def lay_out_file(self, path: Path, outputs: Sequence[Output]) -> dict[str, int]:
        header = safetensors_header({output.name: output for output in outputs})
        offsets, end = {}, len(header)
        for output in outputs:
            offsets[output.name] = end
            end += output.nbytes
        with open(path, "xb") as file:
            file.write(header)
            os.ftruncate(file.fileno(), end)
        return offsets
