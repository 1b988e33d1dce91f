"""HDF5 files with holes: groups, attributes and datasets in place, values to be written at known offsets.

Values are laid out in one piece per dataset and given their bytes at once, so that every dataset has an offset before
the first value is written; HDF5 itself would hold a dataset's values in memory to write them.
"""

from collections.abc import Iterable

import h5py
import numpy as np

from idefics_common.checkpoint.hdf5_file import BFLOAT16, OPAQUE

# The largest attribute that fits in the header of an object, as Keras counts it.
_LARGEST_ATTRIBUTE = 64_512


def add_dataset(file: h5py.File, path: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Make a dataset and the groups above it; returns the offset of its first byte in the file."""
    group_path, _, name = path.rpartition("/")
    group = file.require_group(group_path)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # a file must not differ from one run to the next
    properties.set_obj_track_times(False)
    is_bfloat16 = dtype == BFLOAT16
    stored_type = h5py.h5t.py_create(OPAQUE if is_bfloat16 else dtype, logical=True)
    space = h5py.h5s.create_simple(shape)
    identifier = h5py.h5d.create(group.id, name.encode(), stored_type, space, properties)
    if is_bfloat16:
        h5py.Dataset(identifier).attrs["dtype"] = "bfloat16"
    return identifier.get_offset()


def set_names(file: h5py.File, path: str, attribute: str, names: Iterable[str]) -> None:
    """Set a list of names as an attribute of a group, in parts `attribute0`, `attribute1`, ... if it is too long.

    The parts are those that Keras makes: as few as will do, as equal as can be, counting every name as long as the
    longest.
    """
    attributes = file.require_group(path).attrs
    encoded = [name.encode() for name in names]
    array = np.asarray(encoded)
    parts, count = [array], 1
    while any(part.nbytes > _LARGEST_ATTRIBUTE for part in parts):
        count += 1
        parts = np.array_split(array, count)
    if count == 1:
        attributes[attribute] = encoded
    else:
        attributes.update({f"{attribute}{number}": part for number, part in enumerate(parts)})
