"""Beam search and its memory, in PyTorch and in Keras behind the same methods, for `benchmarks.beams`."""

import time

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, backend
from benchmarks.workers import Peak


class TorchSearcher(TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def _search(self, new_tokens: int, beams: int, **kwargs):
        found = self.model.generate(
            **self.inputs,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            **kwargs,
        )
        self._wait()
        return found

    def search(self, new_tokens: int, beams: int) -> dict:
        """The ids (B, T) of the best text, the seconds until the scores of the first token and until the end, the
        largest number of bytes meanwhile, and what that adds to the bytes before."""
        moments = []

        def clock(ids, scores):
            self._wait()
            moments.append(time.perf_counter())
            return scores

        peak = Peak(self.torch if self.device != "cpu" else None)
        begin = time.perf_counter()
        ids = self._search(new_tokens, beams, logits_processor=[clock]).sequences.cpu().numpy()
        seconds = time.perf_counter() - begin
        first = moments[0] - begin
        return {"ids": ids, "first": first, "seconds": seconds, "peak": peak.bytes(), "added": peak.added()}

    def image_bytes(self, beams: int) -> int | None:
        """Bytes of the features, keys and values of images that a search keeps; None for transformers, whose caches
        have no place for them."""
        if self.kind == "transformers":
            return None
        memory = self._search(2, beams).past_key_values.image_memory
        # of the storage: a view that repeats rows has more elements than memory
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(memory))


class TensorFlowSearcher(TensorFlowBackend):
    """Keras; methods as `TorchSearcher`."""

    def _search(self, new_tokens: int, beams: int, **kwargs) -> np.ndarray:
        return self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, num_beams=beams, do_sample=False, **kwargs
        ).numpy()

    def search(self, new_tokens: int, beams: int) -> dict:
        """As `TorchSearcher.search`; the first token, of which a graph does not tell, is that of a search for one."""
        begin = time.perf_counter()
        self._search(1, beams)
        first = time.perf_counter() - begin
        peak = Peak()
        begin = time.perf_counter()
        ids = self._search(new_tokens, beams)
        seconds = time.perf_counter() - begin
        return {"ids": ids, "first": first, "seconds": seconds, "peak": peak.bytes(), "added": peak.added()}

    def image_bytes(self, beams: int) -> int:
        """Bytes of the features, keys and values of images that the steps of a search hold, run without a graph: those
        of all images, and those of the one image that is read."""
        from idefics_tf.decoding import CachedDecoder

        held, next_logits = [], CachedDecoder.next_logits

        def record(decoder, *args):
            tensors = _tensors(decoder.image_memory) + _tensors(decoder.images_to_read)
            held.append(sum(tensor.numpy().nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values()))
            return next_logits(decoder, *args)

        CachedDecoder.next_logits = record
        try:
            self._search(2, beams, disable_compile=True)
        finally:
            CachedDecoder.next_logits = next_logits
        return max(held)


def _tensors(memory) -> list:
    """Features, keys and values of an image memory."""
    return [memory.hidden_states_BILE, *(tensor for pair in memory.key_values for tensor in pair)]


def searcher(kind: str, **kwargs):
    """The backend called `kind`: "pt", "tf" or "transformers"."""
    return backend(kind, in_torch=TorchSearcher, in_tensorflow=TensorFlowSearcher, **kwargs)
