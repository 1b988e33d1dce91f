"""The same random model twice: ours and transformers' own, which is the oracle."""

import torch
import transformers

from idefics_pt import IdeficsConfig, IdeficsForVisionText2Text
from tests.models import batch, labels_of, random_weights, small_config

transformers.logging.set_verbosity_error()


def our_model(device="cpu", attention="sdpa", seed=0, dtype=torch.float32, **overrides):
    """Our small model with random weights, in evaluation mode."""
    config = IdeficsConfig(**small_config(**overrides))
    model = IdeficsForVisionText2Text._from_config(config, attn_implementation=attention)
    return _with_weights(model, random_weights(config, seed)).eval().to(device, dtype)


def reference_model(device="cpu", attention="sdpa", seed=0, dtype=torch.float32, **overrides):
    """transformers' small model with the weights that `our_model` has for the same arguments."""
    config = transformers.IdeficsConfig(**small_config(**overrides))
    model = transformers.IdeficsForVisionText2Text._from_config(config, attn_implementation=attention)
    return _with_weights(model, random_weights(config, seed)).eval().to(device, dtype)


def _with_weights(model, weights):
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model


def reference_image_states(model, pixel_values, interpolate_pos_encoding=False):
    """What transformers' model attends to, (B, I, L or P, E). Its outputs do not hold it in every version."""
    pixels = pixel_values.flatten(0, 1)
    states = model.model.vision_model(pixels, interpolate_pos_encoding=interpolate_pos_encoding).last_hidden_state
    if model.config.use_resampler:
        states = model.model.perceiver_resampler(states)
    return states.unflatten(0, pixel_values.shape[:2])


def tensors(inputs, device="cpu"):
    """A batch of numpy arrays as tensors."""
    return {name: torch.from_numpy(value).to(device) for name, value in inputs.items()}


def torch_batch(config, device="cpu", with_labels=False, **kwargs):
    """`tests.models.batch` as tensors, with labels on request."""
    inputs = batch(config, **kwargs)
    if with_labels:
        inputs["labels"] = labels_of(inputs)
    return tensors(inputs, device)


CALLS = {
    "left_padding": {},
    "right_padding": {"padding_side": "right"},
    "interpolated": {"image_size": 56},
}
"""The calls in which ours and the reference are compared: arguments of `torch_batch`."""


def parity_call(call: str, config, device="cpu"):
    """A batch with labels, and the further arguments of `forward`, for a row of `CALLS`."""
    kwargs = {"interpolate_pos_encoding": True} if call == "interpolated" else {}
    return torch_batch(config, device, with_labels=True, **CALLS[call]), kwargs


def oracle_loss(logits, labels):
    """Next-token cross entropy, the mean over labels that are not -100, over the full width of the logits.

    transformers cannot compute a loss with an additional vocabulary (defect D2), so the oracle is made of its logits.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
    )
