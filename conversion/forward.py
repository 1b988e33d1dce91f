"""Runs two checkpoints on a fixed prompt with images, one after the other, and compares their answers.

Any format runs in either room: its tensors are read through the parameter table into a model that the room has made.
PyTorch's formats run in `idefics_pt`, Keras's in `idefics_tf`, where its framework is installed. All is computed
in float32, whatever the dtype of the tensors, so that rounding cannot hide a difference.

This is the one module of the converter that imports a framework's room, and only when it is asked for.
"""

import importlib.util
import sys

import numpy as np

from conversion.errors import ConversionError
from conversion.opening import OpenModel
from conversion.reports import ForwardReport
from conversion.streaming import Buffers, cast, row_blocks
from idefics_common.checkpoint.model_tensors import canonical_name
from idefics_common.configuration.fields import IdeficsFields
from idefics_common.parameters import Parameter

TOLERANCE = 1e-4
"""Of logits relative to their scale. The rooms add up in different orders; on small models they differ by 1e-6."""

_PROMPT_LENGTH = 12
_NEW_TOKENS = 4
_SEED = 0

_ROOMS = {"safetensors": "idefics_pt", "bin": "idefics_pt", "keras": "idefics_tf", "tf-h5": "idefics_tf"}
_FRAMEWORKS = {"idefics_pt": "torch", "idefics_tf": "tensorflow"}


def compare_answers(a: OpenModel, b: OpenModel, dtype: np.dtype | None = None, announce: bool = False) -> ForwardReport:
    """Run both checkpoints on the same prompt and compare logits and greedy tokens, or hidden states without a head.

    Args:
        dtype: round the tensors of `a` to this first, because those of `b` are said to have been.
        announce: say on standard error how much memory it takes, before it is taken.

    Raises ConversionError where no framework is installed.
    """
    rooms = _room(a), _room(b)
    if announce:
        nbytes = 4 * sum(parameter.size for parameter in a.untied)
        print(f"forward check: about {nbytes / 1e6:,.0f} MB of memory for one model at a time", file=sys.stderr)
    inputs = prompt(a.config)
    expected = _run(rooms[0], a, inputs, dtype)
    found = _run(rooms[1], b, inputs, None)
    errors = {part: _relative_error(found[part], expected[part]) for part in expected if part != "tokens"}
    answer = "logits" if a.has_head else "last hidden states"
    same_tokens = np.array_equal(expected["tokens"], found["tokens"]) if a.has_head else None
    report = ForwardReport(rooms, answer, errors[answer], TOLERANCE, same_tokens)
    if not report.holds:
        report.first_difference = next((part for part, error in errors.items() if not error <= TOLERANCE), None)
    return report


def prompt(config: IdeficsFields) -> dict[str, np.ndarray]:
    """One row of text with two images, the same every time: text, then text after one image, then after the other."""
    generator = np.random.default_rng(_SEED)
    vision = config.vision_config
    ids = generator.integers(0, config.vocab_size + config.additional_vocab_size, (1, _PROMPT_LENGTH))
    mask = np.zeros((1, _PROMPT_LENGTH, 2), np.int64)
    mask[:, 3:7, 0] = mask[:, 7:, 1] = 1
    size = (1, 2, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "pixel_values": generator.standard_normal(size, dtype=np.float32),
        "image_attention_mask": mask,
    }


def _run(room: str, model: OpenModel, inputs: dict[str, np.ndarray], dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """What a model gives: the outputs of its parts in the order in which they are computed, and its tokens."""
    try:
        forward = (_torch_model if room == "idefics_pt" else _keras_model)(model, dtype)
    except ImportError as error:
        raise ConversionError(f"the forward check cannot run {room}: {error}") from error
    outputs = forward(inputs)
    parts = {"image features": outputs["image_hidden_states"]}
    for number, hidden in enumerate(outputs["hidden_states"]):
        parts[f"decoder layer {number - 1}" if number else "embeddings"] = hidden
    if not model.has_head:
        return parts | {"last hidden states": outputs["last_hidden_state"]}
    parts["logits"] = outputs["logits"]
    tokens = []
    for _ in range(_NEW_TOKENS):
        tokens.append(outputs["logits"][:, -1].argmax(-1))
        ids = np.concatenate([inputs["input_ids"], tokens[-1][:, None]], axis=1)
        mask = np.pad(inputs["image_attention_mask"], ((0, 0), (0, 1), (0, 0)), mode="edge")
        inputs = inputs | {"input_ids": ids, "attention_mask": np.ones_like(ids), "image_attention_mask": mask}
        outputs = forward(inputs)
    return parts | {"tokens": np.stack(tokens)}


def _torch_model(model: OpenModel, dtype: np.dtype | None):
    import torch

    from idefics_common import IdeficsConfig
    from idefics_pt import IdeficsForVisionText2Text, IdeficsModel

    model_class = IdeficsForVisionText2Text if model.has_head else IdeficsModel
    built = model_class(IdeficsConfig.from_pretrained(model.directory)).float().eval()
    state = built.state_dict()
    for parameter in model.untied:
        values = torch.from_numpy(_float32(model, parameter, dtype))
        state[canonical_name(parameter, model.has_head)].copy_(values)

    @torch.no_grad()
    def forward(inputs: dict[str, np.ndarray]) -> dict:
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return _as_numpy(built(**tensors, output_hidden_states=True, use_cache=False))

    return forward


def _keras_model(model: OpenModel, dtype: np.dtype | None):
    from idefics_common import IdeficsConfig
    from idefics_tf import TFIdeficsForVisionText2Text, TFIdeficsModel
    from idefics_tf.weights import weights_by_name

    model_class = TFIdeficsForVisionText2Text if model.has_head else TFIdeficsModel
    built = model_class(IdeficsConfig.from_pretrained(model.directory), dtype="float32")
    weights = weights_by_name(built)
    for parameter in model.untied:
        weight = weights[parameter.name]
        weight.variable.assign(np.ascontiguousarray(weight.layout.apply(_float32(model, parameter, dtype))))

    def forward(inputs: dict[str, np.ndarray]) -> dict:
        return _as_numpy(built(**inputs, output_hidden_states=True, use_cache=False))

    return forward


def _float32(model: OpenModel, parameter: Parameter, dtype: np.dtype | None) -> np.ndarray:
    """The values of a parameter in PyTorch's layout, rounded to a dtype first if one is given."""
    values, buffers = np.empty(parameter.shape, np.float32), Buffers()
    for rows in row_blocks(parameter.shape, 8, buffers.block_bytes):
        block = model.read_rows(parameter, rows, buffers, "rows")
        values[rows.start : rows.stop] = block if dtype is None else cast(block, dtype, buffers)
    return values


def _as_numpy(outputs) -> dict:
    answers = {
        name: np.asarray(outputs[name])
        for name in ("logits", "last_hidden_state")
        if getattr(outputs, name, None) is not None
    }
    return answers | {
        "hidden_states": [np.asarray(hidden) for hidden in outputs.hidden_states],
        "image_hidden_states": np.asarray(outputs.image_hidden_states),
    }


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest value; NaN, which passes no tolerance, where a value is not finite."""
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))


def _room(model: OpenModel) -> str:
    """The room of a format, or the other one where its framework is not installed."""
    wanted = _ROOMS[model.format.name]
    for room in (wanted, *_FRAMEWORKS):
        if importlib.util.find_spec(_FRAMEWORKS[room]) is not None:
            return room
    raise ConversionError("--verify forward needs torch or tensorflow, and neither is installed")
