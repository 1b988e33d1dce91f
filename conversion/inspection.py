"""`inspect`: what a checkpoint is, and anything wrong with it, from its headers alone."""

import os
from collections import Counter

from conversion.errors import ConversionError
from conversion.opening import find_checkpoint, format_at, open_model
from conversion.reports import InspectionReport
from conversion.verification import check_stored_ties
from idefics_common.checkpoint import CheckpointError
from idefics_common.parameters import count_parameters

_CONFIG_FIELDS = (
    "vocab_size",
    "additional_vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "cross_layer_interval",
    "use_resampler",
    "qk_layer_norms",
    "alpha_type",
    "tie_word_embeddings",
)


def inspect(source: str | os.PathLike) -> InspectionReport:
    """Describe a checkpoint; what is wrong with it is in `problems` and not raised.

    Args:
        source: see `conversion.convert`.
    """
    report = InspectionReport(str(source))
    try:
        report.format = format_at(find_checkpoint(source)).name
        with open_model(source) as model:
            checkpoint = model.checkpoint
            report.files = {path.name: path.stat().st_size for path in checkpoint.files}
            report.tensors, report.nbytes = len(checkpoint), checkpoint.nbytes
            counts = count_parameters(model.parameters)
            report.parameters = sum(counts.values())
            report.parameters_by_part = {part.value: count for part, count in counts.items()}
            report.dtypes = dict(Counter(info.dtype.name for info in checkpoint.infos.values()))
            report.config = {name: getattr(model.config, name) for name in _CONFIG_FIELDS}
            report.ignored, report.notes = model.tensors.ignored, list(model.notes)
            check_stored_ties(model)
    except (CheckpointError, ConversionError) as error:
        report.problems.append(str(error))
    return report
