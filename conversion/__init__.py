"""Any IDEFICS checkpoint to any format, and proof that it is the same model: the command is ``convert-weights``.

No model is built and no framework imported but for ``.bin`` files (torch) and for ``--verify forward``; transformers
never is, by this package.
"""

from conversion.converting import convert
from conversion.errors import ConversionError
from conversion.inspection import inspect
from conversion.reports import ConversionReport, ForwardReport, InspectionReport, TensorReport, VerificationReport
from conversion.verification import verify

__all__ = [
    "ConversionError",
    "ConversionReport",
    "ForwardReport",
    "InspectionReport",
    "TensorReport",
    "VerificationReport",
    "convert",
    "inspect",
    "verify",
]
