"""Every parameter of the model, listed once: the table, its expansion for a configuration, and what derives from it.

Needs neither transformers nor a backend.
"""

from idefics_common.parameters.expansion import (
    Parameter,
    count_parameters,
    dimensions,
    expand,
    stale_buffer_names,
)
from idefics_common.parameters.rows import Kind, Part, Row
from idefics_common.parameters.table import HEAD, MODEL, TABLE, num_cross_layers

__all__ = [
    "HEAD",
    "MODEL",
    "TABLE",
    "Kind",
    "Parameter",
    "Part",
    "Row",
    "count_parameters",
    "dimensions",
    "expand",
    "num_cross_layers",
    "stale_buffer_names",
]
