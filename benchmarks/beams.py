"""What does beam search cost in time and in memory, when a prompt brings many images?

    python -m benchmarks.beams [--backend transformers pt tf] [--beams 4] [--images 16] [--new-tokens 8]
                               [--dtype float32] [--config CONFIG] [--threads 2] [--repeats 5] [--device cpu]

Images are the same for all beams of a prompt. The bytes of their features and of their keys and values are those that
the search keeps from step to step, with one beam and with all of them: equal, where nothing is copied per beam.
transformers keeps none, and encodes the images of a prompt once per beam. Memory is the largest resident set in a
search, and what it adds to the set before; nothing, where the framework has kept what it took for the searches before.
The time per token is that of all tokens but the first. Tokens are compared before anything is timed.
"""

import json
import time
from statistics import median

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, median_of_known, timing
from benchmarks.rounds import in_turns, refuse_others, started
from benchmarks.workload import prompts


class TorchSearcher(TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def _search(self, new_tokens: int, beams: int, **kwargs):
        kwargs |= {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False, "use_cache": True}
        found = self.model.generate(**self.inputs, return_dict_in_generate=True, **kwargs)
        self.wait()
        return found

    def search(self, new_tokens: int, beams: int) -> dict:
        """The ids (B, T) of the best text, the seconds until the scores of the first token and until the end, the
        largest number of bytes meanwhile, and what that adds to the bytes before."""
        moments = []

        def clock(ids, scores):
            self.wait()
            moments.append(time.perf_counter())
            return scores

        peak = self.peak()
        begin = time.perf_counter()
        ids = self._search(new_tokens, beams, logits_processor=[clock]).sequences.cpu().numpy()
        seconds = time.perf_counter() - begin
        first = moments[0] - begin
        return {"ids": ids, "first": first, "seconds": seconds, "peak": peak.bytes(), "added": peak.added()}

    def image_bytes(self, beams: int) -> int | None:
        """Bytes of the features, keys and values of images that a search keeps; None for transformers, whose caches
        have no place for them."""
        if not self.is_ours:
            return None
        memory = self._search(2, beams).past_key_values.image_memory
        # of the storage: a view that repeats rows has more elements than memory
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(memory))


class TensorFlowSearcher(TensorFlowBackend):
    """Keras; methods as `TorchSearcher`."""

    def _search(self, new_tokens: int, beams: int, **kwargs) -> np.ndarray:
        kwargs |= {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False}
        return self.model.generate(**self.inputs, **kwargs).numpy()

    def search(self, new_tokens: int, beams: int) -> dict:
        """As `TorchSearcher.search`; the first token, of which a graph does not tell, is that of a search for one."""
        begin = time.perf_counter()
        self._search(1, beams)
        first = time.perf_counter() - begin
        peak = self.peak()
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


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--beams", type=int, default=4, help="beams (4)")
    parser.add_argument("--images", type=int, default=16, help="images of the prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate (8)")
    options = parsed(parser)
    inputs, ids = prompts(json.loads(options.config.read_text()), [options.images]), {}
    with started(options, TorchSearcher, TensorFlowSearcher, **of_model(options)) as workers:
        for name, worker in workers.items():
            worker.call("prepare", inputs)
            ids[name] = worker.call("search", options.new_tokens, options.beams)["ids"]  # warms up and compiles
        if options.dtype == "float32":
            refuse_others(ids, "tokens")
        runs = in_turns(workers, options.repeats, "search", options.new_tokens, options.beams)
        # after the memory of searches, because what these take may stay with the process
        image_bytes = {
            f"image bytes, {beams} beam{'s' * (beams > 1)}": in_turns(workers, 1, "image_bytes", beams)
            for beams in (1, options.beams)
        }
    rows = []
    for name, searches in runs.items():
        steps = [(search["seconds"] - search["first"]) / (options.new_tokens - 1) for search in searches]
        rows.append(
            {
                "backend": name,
                "beams": options.beams,
                "images": options.images,
                "first token s": median(search["first"] for search in searches),
                "ms per token": 1000 * median(steps),
                **timing([search["seconds"] for search in searches]),
                "peak GB": median_of_known((search["peak"] for search in searches), 1e9),
                "added GB": median_of_known((search["added"] for search in searches), 1e9),
                **{column: found[name][0] for column, found in image_bytes.items()},
            }
        )
    add_ratio(rows, "s")
    add_ratio(rows, "peak GB", "peak ratio")
    columns = ["backend", "first token s", "ms per token", "s", "ratio", "peak GB", "added GB", "peak ratio"]
    finish("beams", options, rows, [*columns, *image_bytes])


if __name__ == "__main__":
    main()
