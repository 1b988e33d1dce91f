"""How long does beam search take, when a prompt brings many images?

The whole search is timed, from the images to the last token. Images are the same for all beams of a prompt: ours
encodes them once, transformers once per beam. In float32 the tokens must be equal before anything is timed.
"""

import json

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, timing
from benchmarks.rounds import seconds_of_outputs
from benchmarks.workload import prompts


class _Searcher:
    """Beam search; lives in a worker."""

    def prepare(self, inputs: dict, new_tokens: int, beams: int):
        """Hold a prompt (numpy arrays) and what is asked for."""
        super().prepare(inputs)
        self.kwargs = {"max_new_tokens": new_tokens, "num_beams": beams, "do_sample": False, "use_cache": True}

    def output(self) -> np.ndarray:
        """The ids (B, T) of the best text."""
        return self.array(self.model.generate(**self.inputs, **self.kwargs))


class TorchSearcher(_Searcher, TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""


class TensorFlowSearcher(_Searcher, TensorFlowBackend):
    """Keras."""


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--beams", type=int, default=4, help="beams (4)")
    parser.add_argument("--images", type=int, default=16, help="images of the prompt (16)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens to generate (8)")
    options = parsed(parser)
    inputs = prompts(json.loads(options.config.read_text()), [options.images]), options.new_tokens, options.beams
    what = "tokens" if options.dtype == "float32" else None
    seconds = seconds_of_outputs(options, (TorchSearcher, TensorFlowSearcher), inputs, what, **of_model(options))
    rows = [
        {"backend": name, "beams": options.beams, "images": options.images, **timing(values)}
        for name, values in seconds.items()
    ]
    add_ratio(rows, "s")
    finish("beams", options, rows, ["backend", "beams", "images", "s", "ratio"])


if __name__ == "__main__":
    main()
