"""Two turns about the same images, in PyTorch and in Keras behind the same methods, for `benchmarks.conversation`."""

import copy
import time
from contextlib import contextmanager

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend

IMAGE_WORK = ("vision tower", "resampler", "image keys/values")


class TorchConversation(TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def first_turn(self, inputs: dict, new_tokens: int) -> np.ndarray:
        """Answer a prompt and keep the cache; returns the ids (B, T), the prompt included."""
        self.prepare(inputs)
        found = self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True, return_dict_in_generate=True
        )
        self.cache = found.past_key_values
        return found.sequences.cpu().numpy()

    def _inputs(self, is_warm: bool) -> dict:
        if not is_warm:
            return self.inputs
        # a turn goes on in its cache; the next repetition wants it as it was
        text = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        return {**text, "past_key_values": copy.deepcopy(self.cache)}

    def answer(self, new_tokens: int, is_warm: bool) -> np.ndarray:
        """The ids (B, T) of the second turn, its text included."""
        inputs = self._inputs(is_warm)
        return self.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False).cpu().numpy()

    def first_token(self, is_warm: bool) -> float:
        """Seconds until the first token of the second answer."""
        inputs = self._inputs(is_warm)
        self._wait()
        begin = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        self._wait()
        return time.perf_counter() - begin

    def count_image_work(self, new_tokens: int) -> dict[str, int]:
        """How often each module that works on images runs in a warm second turn."""
        with _counted_calls(_image_work(self.model, "forward")) as counts:
            self.answer(new_tokens, True)
        return counts


class TensorFlowConversation(TensorFlowBackend):
    """Keras; methods as `TorchConversation`."""

    def first_turn(self, inputs: dict, new_tokens: int) -> np.ndarray:
        """Answer a prompt and keep the cache; returns the ids (B, T), the prompt included."""
        self.prepare(inputs)
        found = self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True
        )
        self.cache = found.past_key_values
        return found.sequences.numpy()

    def _inputs(self, is_warm: bool) -> dict:
        if not is_warm:
            return self.inputs
        text = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        return {**text, "past_key_values": self.cache}

    def answer(self, new_tokens: int, is_warm: bool) -> np.ndarray:
        """The ids (B, T) of the second turn, its text included."""
        return self.model.generate(**self._inputs(is_warm), max_new_tokens=new_tokens, do_sample=False).numpy()

    def first_token(self, is_warm: bool) -> float:
        """Seconds until the first token of the second answer."""
        inputs = self._inputs(is_warm)
        begin = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False).numpy()
        return time.perf_counter() - begin

    def count_image_work(self, new_tokens: int) -> dict[str, int]:
        """How often each module that works on images is called while the graph of a warm second turn is traced."""
        with _counted_calls(_image_work(self.model, "call")) as counts:
            self.answer(new_tokens, True)
        return counts


def _image_work(model, call: str) -> dict[str, list]:
    """The methods that work on images, as (object, name), by what they do."""
    inner = model.model
    resampler = getattr(inner, "perceiver_resampler", None)
    return {
        "vision tower": [(inner.vision_model, call)],
        "resampler": [] if resampler is None else [(resampler, call)],
        "image keys/values": [(block.cross_attn, "project_images") for block in inner.gated_cross_attn_layers],
    }


@contextmanager
def _counted_calls(methods: dict[str, list]):
    """Numbers of calls of methods, by name, while the context lasts."""
    counts = dict.fromkeys(methods, 0)

    def counting(name, function):
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    originals = []
    for name, places in methods.items():
        for owner, method in places:
            function = getattr(owner, method)
            originals.append((owner, method, function))
            setattr(owner, method, counting(name, function))
    yield counts
    for owner, method, function in originals:
        setattr(owner, method, function)


def conversation(kind: str, fused: bool, **kwargs):
    """The backend called `kind`: "pt", "tf" or "transformers"."""
    return TensorFlowConversation(kind, **kwargs) if kind == "tf" else TorchConversation(kind, fused=fused, **kwargs)
