"""The home format: `model.safetensors`, in shards or not, with canonical names and PyTorch's layout."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from conversion.formats.base import Output, Place, shard_names
from idefics_common.checkpoint import Checkpoint, open_checkpoint
from idefics_common.checkpoint.safetensors_writer import safetensors_header
from idefics_common.layouts import IDENTITY, Layout
from idefics_common.parameters import Parameter


class SafetensorsFormat:
    """See `conversion.formats.base.Format`."""

    name = "safetensors"
    directory_files = ("model.safetensors", "model.safetensors.index.json")
    stores_tied = False

    def stored_name(self, parameter: Parameter) -> str:
        return parameter.name

    def layout(self, parameter: Parameter) -> Layout:
        return IDENTITY

    def recognises(self, file_name: str) -> bool:
        return file_name.endswith((".safetensors", ".safetensors.index.json"))

    def open(self, path: Path) -> Checkpoint:
        return open_checkpoint(path)

    def file_names(self, count: int) -> list[str]:
        return shard_names("model", ".safetensors", count)

    def notes(self, outputs: Sequence[Output]) -> list[str]:
        return []

    def lay_out(self, directory: Path, shards: Sequence[Sequence[Output]]) -> dict[str, Place]:
        places = {}
        for file_name, shard in zip(self.file_names(len(shards)), shards, strict=True):
            header = safetensors_header({output.name: output for output in shard})
            offset = len(header)
            for output in shard:
                places[output.name] = Place(file_name, offset)
                offset += output.nbytes
            with open(directory / file_name, "xb") as file:
                file.write(header)
                os.ftruncate(file.fileno(), offset)
        if len(shards) > 1:
            write_index(directory / "model.safetensors.index.json", shards, places)
        return places

    def finish(
        self, directory: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place], checksums: Mapping
    ) -> None:
        """Nothing: no byte outside the values depends on them."""


def write_index(path: Path, shards: Sequence[Sequence[Output]], places: Mapping[str, Place]) -> None:
    """Write the index that says in which file each tensor lies, as transformers writes it."""
    total = sum(output.nbytes for shard in shards for output in shard)
    weight_map = {name: place.file for name, place in places.items()}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
