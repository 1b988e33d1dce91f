"""Two turns about the same images, in PyTorch and in Keras behind the same methods, for `benchmarks.conversation`."""

import copy
import time
from contextlib import contextmanager

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, backend

IMAGE_WORK = ("vision tower", "resampler", "image keys/values")


class TorchConversation(TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def first_turn(self, inputs: dict, new_tokens: int) -> tuple[np.ndarray, dict[str, int] | None]:
        """Answer a prompt and keep the cache.

        Returns:
            the ids (B, T), the prompt included, and how often each module that works on images ran; None in place of
            the latter for transformers, whose modules are others.
        """
        self.prepare(inputs)
        methods = {} if self.kind == "transformers" else _image_work(self.model, "forward")
        with _counted_calls(methods) as counts:
            found = self.model.generate(
                **self.inputs, max_new_tokens=new_tokens, do_sample=False, use_cache=True, return_dict_in_generate=True
            )
        self.cache = found.past_key_values
        return found.sequences.cpu().numpy(), counts or None

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

    def counted_answer(self, new_tokens: int) -> tuple[np.ndarray, dict[str, int]]:
        """The warm `answer`, and how often each module that works on images runs in it."""
        with _counted_calls(_image_work(self.model, "forward")) as counts:
            ids = self.answer(new_tokens, True)
        return ids, counts

    def first_token(self, is_warm: bool) -> float:
        """Seconds until the first token of the second answer."""
        inputs = self._inputs(is_warm)
        self._wait()
        begin = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        self._wait()
        return time.perf_counter() - begin


class TensorFlowConversation(TensorFlowBackend):
    """Keras; methods as `TorchConversation`.

    Calls are counted while a graph is traced: what is not called there is in no part of it, and all else is in it as
    often as it was called.
    """

    def first_turn(self, inputs: dict, new_tokens: int) -> tuple[np.ndarray, dict[str, int]]:
        """Answer a prompt and keep the cache; see `TorchConversation`."""
        self.prepare(inputs)
        with self._counted_while_tracing() as counts:
            found = self.model.generate(
                **self.inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True
            )
        self.cache = found.past_key_values
        return found.sequences.numpy(), counts

    def _inputs(self, is_warm: bool) -> dict:
        if not is_warm:
            return self.inputs
        text = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        return {**text, "past_key_values": self.cache}

    def answer(self, new_tokens: int, is_warm: bool) -> np.ndarray:
        """The ids (B, T) of the second turn, its text included."""
        return self.model.generate(**self._inputs(is_warm), max_new_tokens=new_tokens, do_sample=False).numpy()

    def counted_answer(self, new_tokens: int) -> tuple[np.ndarray, dict[str, int]]:
        """The warm `answer`, and how often each module that works on images is called for it."""
        with self._counted_while_tracing() as counts:
            ids = self.answer(new_tokens, True)
        return ids, counts

    def first_token(self, is_warm: bool) -> float:
        """Seconds until the first token of the second answer."""
        inputs = self._inputs(is_warm)
        begin = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False).numpy()
        return time.perf_counter() - begin

    @contextmanager
    def _counted_while_tracing(self):
        before = len(self._graphs())
        with _counted_calls(_image_work(self.model, "call")) as counts:
            yield counts
        if len(self._graphs()) == before:
            raise RuntimeError("No graph was traced, so no call could be counted: ask before anything else runs.")

    def _graphs(self) -> dict:
        return self.model.generation_graphs.on([variable.value for variable in self.model.weights])


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
    try:
        yield counts
    finally:
        for owner, method, function in originals:
            setattr(owner, method, function)


def conversation(kind: str, **kwargs):
    """The backend called `kind`: "pt", "tf" or "transformers"."""
    return backend(kind, in_torch=TorchConversation, in_tensorflow=TensorFlowConversation, **kwargs)
