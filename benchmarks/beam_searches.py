"""Beam search and its memory, in PyTorch and in Keras behind the same methods, for `benchmarks.beams`."""

import time

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend
from benchmarks.workers import peak_bytes_since_reset, reset_peak, resident_bytes


class _Searches:
    """What is measured of a search; on a class with `_search`."""

    def tokens(self, new_tokens: int, beams: int) -> np.ndarray:
        """The ids (B, T) of the best text."""
        return np.asarray(self._search(new_tokens, beams).sequences.cpu())

    def search(self, new_tokens: int, beams: int) -> dict:
        """Seconds of a search, the largest number of bytes in it, and what that adds to the bytes before."""
        before = resident_bytes()
        is_known = reset_peak()
        begin = time.perf_counter()
        self._search(new_tokens, beams)
        seconds = time.perf_counter() - begin
        peak = peak_bytes_since_reset() if is_known else None
        return {"seconds": seconds, "peak": peak, "added": peak - before if is_known else None}


class TorchSearcher(_Searches, TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def _search(self, new_tokens: int, beams: int):
        found = self.model.generate(
            **self.inputs,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        )
        self._wait()
        return found

    def image_bytes(self, beams: int) -> int | None:
        """Bytes of the features, keys and values of images that a search keeps; None where it keeps none."""
        memory = getattr(self._search(2, beams).past_key_values, "image_memory", None)
        # of the storage: a view that repeats rows has more elements than memory
        return None if memory is None else sum(tensor.untyped_storage().nbytes() for tensor in _tensors(memory))


class TensorFlowSearcher(_Searches, TensorFlowBackend):
    """Keras; methods as `TorchSearcher`."""

    def tokens(self, new_tokens: int, beams: int) -> np.ndarray:
        """The ids (B, T) of the best text."""
        return self._search(new_tokens, beams).sequences.numpy()

    def _search(self, new_tokens: int, beams: int, **kwargs):
        found = self.model.generate(
            **self.inputs,
            max_new_tokens=new_tokens,
            num_beams=beams,
            do_sample=False,
            return_dict_in_generate=True,
            **kwargs,
        )
        found.sequences.numpy()
        return found

    def image_bytes(self, beams: int) -> int:
        """Bytes of the features, keys and values of images that the steps of a search hold, run without a graph."""
        from idefics_tf.decoding import CachedDecoder

        held, next_logits = [], CachedDecoder.next_logits

        def record(decoder, *args):
            held.append(sum(tensor.numpy().nbytes for tensor in _tensors(decoder.image_memory)))
            return next_logits(decoder, *args)

        CachedDecoder.next_logits = record
        self._search(2, beams, disable_compile=True)
        CachedDecoder.next_logits = next_logits
        return max(held)


def _tensors(memory) -> list:
    """Features, keys and values of an image memory."""
    return [memory.hidden_states_BILE, *(tensor for pair in memory.key_values for tensor in pair)]


def searcher(kind: str, fused: bool, **kwargs):
    """The backend called `kind`: "pt", "tf" or "transformers"."""
    return TensorFlowSearcher(kind, **kwargs) if kind == "tf" else TorchSearcher(kind, fused=fused, **kwargs)
