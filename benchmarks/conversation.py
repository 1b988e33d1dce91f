"""How long until the first token of the second answer, when the cache of the first has seen the images?

A prompt of --images images is answered with --new-tokens tokens; then a question of --question tokens follows. Warm: it
is asked with the cache of the first turn and without images. Cold: the whole text and the images are read anew, which
is all that transformers is asked for. The first answer is compared with the first backend's, and the warm second one
with the cold, before anything is timed.
"""

import copy
import json
import time

import numpy as np

from benchmarks.backends import TensorFlowBackend, TorchBackend, of_model
from benchmarks.options import parsed, parser_of
from benchmarks.report import add_ratio, finish, timing
from benchmarks.rounds import in_turns, refuse_others, started
from benchmarks.workload import prompts

_ANSWER = 4  # tokens of the second answer that are compared


class _Conversation:
    """Two turns about the same images; lives in a worker."""

    def first_turn(self, inputs: dict, new_tokens: int) -> np.ndarray:
        """Answer a prompt and keep the cache; the ids (B, T)."""
        self.prepare(inputs)
        found = self.model.generate(
            **self.inputs, max_new_tokens=new_tokens, do_sample=False, return_dict_in_generate=True
        )
        self.cache = found.past_key_values
        return self.array(found.sequences)

    def turn(self, is_warm: bool) -> dict:
        """Inputs of the second turn: warm with the cache of the first and without images, cold without the cache."""
        if not is_warm:
            return self.inputs
        text = {name: value for name, value in self.inputs.items() if name != "pixel_values"}
        return {**text, "past_key_values": self.cache}

    def answer(self, new_tokens: int, is_warm: bool) -> np.ndarray:
        """The ids (B, T) of the second turn."""
        return self.array(self.model.generate(**self.turn(is_warm), max_new_tokens=new_tokens, do_sample=False))

    def first_token(self, is_warm: bool) -> float:
        """Seconds until the first token of the second answer."""
        inputs = self.turn(is_warm)
        self.wait()
        begin = time.perf_counter()
        self.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        self.wait()
        return time.perf_counter() - begin


class TorchConversation(_Conversation, TorchBackend):
    """PyTorch: ours ("pt") or transformers' own ("transformers")."""

    def turn(self, is_warm: bool) -> dict:
        """See `_Conversation.turn`; a turn goes on in its cache, and the next repetition wants it as it was."""
        inputs = super().turn(is_warm)
        return inputs | {"past_key_values": copy.deepcopy(self.cache)} if is_warm else inputs


class TensorFlowConversation(_Conversation, TensorFlowBackend):
    """Keras."""


def second_turn(first: dict, sequences: np.ndarray, question: np.ndarray) -> dict:
    """Inputs of the second turn: all of the text so far and the question, which sees what the first answer saw."""
    ids_BT = np.concatenate((sequences, question), axis=1)
    missing = (0, ids_BT.shape[1] - first["input_ids"].shape[1])
    return {
        "input_ids": ids_BT,
        "attention_mask": np.pad(first["attention_mask"], ((0, 0), missing), constant_values=1),
        "pixel_values": first["pixel_values"],
        "image_attention_mask": np.pad(first["image_attention_mask"], ((0, 0), missing, (0, 0)), mode="edge"),
    }


def measure(workers: dict, first: dict, question: np.ndarray, options) -> list[dict]:
    """Rows of the table: the cold turn of each backend, then the warm ones of ours."""
    warm_ones = {name: worker for name, worker in workers.items() if name != "transformers"}
    answers = {name: worker.call("first_turn", first, options.new_tokens) for name, worker in workers.items()}
    if options.dtype == "float32":
        refuse_others(answers, "first answers")
    # all go on from one text, so that the second turns are the same wherever they run
    second = second_turn(first, answers[options.backend[0]], question)
    for name, worker in workers.items():
        worker.call("prepare", second)
        cold = worker.call("answer", _ANSWER, False)
        worker.call("first_token", False)
        if name in warm_ones:
            warm = worker.call("answer", _ANSWER, True)
            if options.dtype == "float32" and not np.array_equal(warm, cold):
                raise SystemExit(f"{name}: with the cache it answers {warm}, without {cold}.")
            worker.call("first_token", True)
    rows = []
    for turn, asked in {"cold": workers, "warm": warm_ones}.items():
        for name, seconds in in_turns(asked, options.repeats, "first_token", turn == "warm").items():
            rows.append({"backend": name, "turn": turn, "images": options.images, **timing(seconds)})
    return rows


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=16, help="images of the prompt (16)")
    parser.add_argument("--question", type=int, default=24, help="tokens of the second question (24)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens of the first answer (16)")
    options = parsed(parser)
    config = json.loads(options.config.read_text())
    question = np.random.default_rng(1).integers(10, config["vocab_size"], (1, options.question))
    with started(options, TorchConversation, TensorFlowConversation, **of_model(options)) as workers:
        rows = measure(workers, prompts(config, [options.images]), question, options)
    for name in options.backend:
        add_ratio([row for row in rows if row["backend"] == name], "s", "of cold")
    add_ratio(rows, "s")
    finish("conversation", options, rows, ["backend", "turn", "s", "of cold", "ratio"])


if __name__ == "__main__":
    main()
