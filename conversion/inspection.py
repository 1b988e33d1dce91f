"""`inspect`: what a checkpoint is, and anything wrong with it, from its headers alone."""

import os
from collections import Counter

from conversion.errors import ConversionError
from conversion.opening import format_at, locate, open_model
from conversion.reports import InspectionReport
from conversion.verification import compare_stored_ties
from idefics_common.checkpoint import CheckpointError
from idefics_common.parameters import Part

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
        report.format = format_at(locate(source)).name
        with open_model(source) as model:
            infos = [model.source.info(name) for name in model.source]
            report.files = {path.name: path.stat().st_size for path in model.files}
            report.tensors, report.nbytes = len(infos), sum(info.nbytes for info in infos)
            counts = dict.fromkeys(Part, 0)
            for parameter in model.own:
                counts[parameter.part] += parameter.size
            report.parameters = sum(counts.values())
            report.parameters_by_part = {part.value: count for part, count in counts.items()}
            report.dtypes = dict(Counter(info.dtype.name for info in infos))
            report.config = {name: getattr(model.config, name) for name in _CONFIG_FIELDS}
            report.ignored, report.notes = model.ignored, list(model.notes)
            compare_stored_ties(model)
    except (CheckpointError, ConversionError) as error:
        report.problems.append(str(error))
    return report
