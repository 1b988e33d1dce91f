"""`generate`: with the keywords of transformers, as one compiled graph from the prompt to the last token.

Unusual: a call looks up, or traces once, a graph for its settings and for a bucket of lengths (64, 128, 256, ...
positions), in which the sizes of batch, prompt and images are open. Within someone else's `tf.function`, or with sizes
that are not known, the same code becomes a part of that graph.

Mirrors `idefics_pt/generation.py`, which leaves the search itself to transformers. Axes: see `idefics_common`.
"""

import contextlib
import itertools
import operator

import numpy as np
import tensorflow as tf
from transformers import GenerationConfig

from idefics_common.calls.images import Given, one_form
from idefics_common.calls.known_images import remember_source, source_of
from idefics_common.calls.text import check_text
from idefics_tf.beam_search import beam_search
from idefics_tf.cache import open_spec
from idefics_tf.decoding import CachedDecoder, Prompt, UncachedDecoder
from idefics_tf.generation_settings import Settings, complete, lengths_of, settings_of
from idefics_tf.image_view import settle_images
from idefics_tf.inputs import as_tensors, named_inputs
from idefics_tf.outputs import TFIdeficsGenerateOutput
from idefics_tf.sampling import sample
from idefics_tf.search_state import Limits

IMAGES = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")
_INPUTS = ("input_ids", "inputs_embeds", "attention_mask", "image_attention_mask", "past_key_values", *IMAGES)
_LEAST_BUCKET = 64

_streamers = {}  # those of running calls, by number: a graph can hold a number, but not an object
_stream_numbers = itertools.count()


def bucket(length: int) -> int:
    """The size of the cache for texts of this length: the next power of two, at least 64."""
    return max(_LEAST_BUCKET, 1 << (length - 1).bit_length())


class GenerationMixin:
    """`generate` for a model with `model`, `logits_of` and `generation_config`."""

    def get_config(self):
        return {**super().get_config(), "generation_config": self.generation_config.to_dict()}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        generation_config = GenerationConfig.from_dict(config.pop("generation_config"))
        model = super().from_config(config, custom_objects)
        model.generation_config = generation_config
        return model

    @tf.autograph.experimental.do_not_convert
    def generate(
        self,
        input_ids=None,
        generation_config: GenerationConfig | None = None,
        streamer=None,
        seed=None,
        jit_compile=False,
        interpolate_pos_encoding=False,
        **kwargs,
    ):
        """Continue prompts.

        Args:
            input_ids: (B, T) ids, int32 or int64; or a dict with all inputs, as the processor makes it, or a list
                ``[input_ids, attention_mask]``. Prompts shorter than others are padded on the left.
            generation_config: settings; by default, and where it has None, those of `self.generation_config`.
            streamer: gets the prompt, then the ids (rows,) of each step as soon as they are chosen, numpy; see
                `transformers.TextStreamer`. Not for beam search.
            seed: of sampling. Without one, drawn from TensorFlow's global generator (`tf.random.set_seed`).
            jit_compile: compile the loop with XLA. That happens anew for each number of rows and images, so it pays
                where these stay the same over many calls. (`disable_compile`, a field of `GenerationConfig`, is the
                other extreme: nothing is compiled, and the search runs operation by operation.)
            interpolate_pos_encoding: allow images of another size than the model's.
            kwargs: other inputs (`attention_mask`, `pixel_values` or images in another form, `image_attention_mask`,
                `inputs_embeds`, `past_key_values`), which mean what they mean to `call`; and fields of
                `GenerationConfig`, before which `generation_config` stands back. With `past_key_values`, the other
                inputs are of the whole text, and images are the new ones, or once more those that the cache has seen,
                which costs nothing if they are the same tensor.

        Returns:
            (B * num_return_sequences, length) ids in the dtype of `input_ids`, prompts included (without them where
            only embeddings were given); or with `return_dict_in_generate` a `TFIdeficsGenerateOutput`.

        Raises:
            ValueError: if settings contradict each other or are not to be had here, or inputs contradict each other.
            TypeError: if a keyword is neither an input nor a setting.
        """
        kwargs = as_tensors(named_inputs(self.call, (input_ids,), kwargs), self.config, interpolate_pos_encoding)
        input_ids = kwargs.pop("input_ids", None)
        config, given = complete(self.generation_config, generation_config, kwargs)
        unknown = [name for name in given if name not in _INPUTS]
        if unknown:
            raise TypeError(f"generate got unexpected keyword arguments: {', '.join(unknown)}.")
        settings = settings_of(
            config,
            self.config.vocab_size + self.config.additional_vocab_size,
            interpolate_pos_encoding=interpolate_pos_encoding,
            streams=streamer is not None,
        )
        _check_combination(settings, given, jit_compile, config.disable_compile)
        prompt, source = self._prompt({"input_ids": input_ids, **given}, settings)
        unseen = prompt.text_length - prompt.length if prompt.embeddings_BTD is not None else 0
        max_length, min_length = lengths_of(config, prompt.length, unseen, self.config.max_position_embeddings)
        if seed is None:
            seed = tf.random.uniform((2,), maxval=2**31 - 1, dtype=tf.int32) if settings.do_sample else (0, 0)
        else:
            seed = tf.stack((seed, 0))
        numbers = {"max_length": max_length, "min_length": min_length, "seed": seed, "stream": next(_stream_numbers)}
        numbers = {name: tf.cast(number, tf.int32) for name, number in numbers.items()}
        positions = max_length + unseen
        capacity = bucket(positions) if isinstance(positions, int) else positions
        search = self._search if tf.inside_function() or config.disable_compile else self._compiled_search
        with _streaming(streamer, numbers["stream"], prompt) if settings.streams else contextlib.nullcontext():
            found = search(prompt, numbers, settings, capacity, jit_compile)
        if source is not None and "past_key_values" in found and tf.executing_eagerly():
            remember_source(found["past_key_values"].image_memory.hidden_states_BILE, source)
        dtype = tf.convert_to_tensor(input_ids).dtype if input_ids is not None else tf.int64
        return _result(found, dtype, config.return_dict_in_generate)

    def _prompt(self, given: dict, settings: Settings):
        """The prompt, and what `_with_images` says of its images."""
        ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
        if ids is None and embeddings is None:
            raise ValueError("generate needs input_ids or inputs_embeds.")
        mask = given.get("attention_mask")
        if mask is not None:
            mask = tf.cast(tf.convert_to_tensor(mask), tf.bool)
        if embeddings is None:
            ids = tf.convert_to_tensor(ids)
            check_text(ids, None, mask, has_cache=False)
            if tf.executing_eagerly():
                self.model.embed_tokens.check_ids(ids)
            mask = _mask_of_padding(ids, settings) if mask is None else mask
        else:
            embeddings = tf.cast(embeddings, self.compute_dtype)
            check_text(None, embeddings, mask, has_cache=False)
            mask = tf.ones(tf.shape(embeddings)[:2], tf.bool) if mask is None else mask
            ids = tf.zeros((tf.shape(embeddings)[0], 0), tf.int32) if ids is None else tf.convert_to_tensor(ids)
            if len(ids.shape) != 2:
                raise ValueError(f"input_ids must have shape (batch, text_len), got {tuple(ids.shape)}.")
        cache = given.get("past_key_values")
        prompt = Prompt(tf.cast(ids, tf.int32), mask, embeddings, images={}, image_mask_BTI=None, cache=cache)
        return self._with_images(prompt, given)

    def _with_images(self, prompt: Prompt, given: dict):
        """A prompt with its images and its image mask, which are checked while their sizes are known.

        Returns:
            the prompt; and the tensor that all images of the text were given as, in this call or an earlier one, or
            None if that is not known.
        """
        images = one_form(**{name: given.get(name) for name in IMAGES})
        if images is not None:
            images = images[0], tf.convert_to_tensor(images[1])
        start = 0 if prompt.cache is None else prompt.cache.get_seq_length()
        rows = prompt.attention_mask_BS.shape[0] or tf.shape(prompt.attention_mask_BS)[0]
        length = prompt.text_length - start
        if isinstance(length, int) and length <= 0:
            raise ValueError(
                f"past_key_values hold {start} positions and the text has {prompt.text_length}: give the whole text, "
                "which must be longer than what the cache has read."
            )
        mask = given.get("image_attention_mask")
        if mask is not None:
            mask = _extended(tf.convert_to_tensor(mask), prompt.text_length, length)
        ids = prompt.ids_BT[:, start:] if prompt.embeddings_BTD is None else None
        memory = None if prompt.cache is None else prompt.cache.image_memory
        mask, kind = settle_images(self.model, images, mask, memory, start, ids, (rows, length))
        if mask is None or (tf.executing_eagerly() and memory is None and not bool(tf.reduce_any(mask))):
            return prompt, None  # nothing is looked at, so this is text
        prompt = prompt._replace(image_mask_BTI=mask)
        if kind is Given.NONE:
            return prompt, source_of(memory.hidden_states_BILE)
        return prompt._replace(images=dict([images])), images[1] if kind is Given.ALL else None

    def _compiled_search(self, prompt: Prompt, numbers: dict, settings: Settings, capacity: int, jit_compile: bool):
        spec = _open_spec(prompt)
        graphs = self.generation_graphs.on([variable.value for variable in self.weights])
        key = (settings, capacity, jit_compile, repr(spec))
        if key not in graphs:

            def search(prompt, numbers):
                return self._search(prompt, numbers, settings, capacity, jit_compile)

            numbers_spec = {name: tf.TensorSpec.from_tensor(number) for name, number in numbers.items()}
            graphs[key] = tf.function(search, autograph=False).get_concrete_function(spec, numbers_spec)
        return graphs[key](prompt, numbers)

    def _search(self, prompt: Prompt, numbers: dict, settings: Settings, capacity, jit_compile: bool) -> dict:
        """Everything from the prompt to the last token, as operations of a graph."""
        decoder_class = CachedDecoder if settings.use_cache else UncachedDecoder
        decoder = decoder_class(self, prompt, settings.rows_per_prompt, capacity, settings.interpolate_pos_encoding)
        limits = Limits(tf.convert_to_tensor(prompt.length), numbers["min_length"], numbers["max_length"])
        ids_RC = tf.repeat(prompt.ids_BT, settings.rows_per_prompt, axis=0)
        ids_RC = tf.pad(ids_RC, ((0, 0), (0, capacity - tf.shape(ids_RC)[1])))
        first_B = tf.zeros_like(prompt.attention_mask_BS[:, 0], dtype=tf.int32)
        if prompt.embeddings_BTD is None:
            first_B = tf.argmax(tf.cast(prompt.attention_mask_BS, tf.int32), axis=1, output_type=tf.int32)
        first_R = tf.repeat(first_B, settings.rows_per_prompt)

        def loop():
            if settings.num_beams > 1:
                return beam_search(decoder, ids_RC, first_R, limits, settings, numbers["seed"])
            put = _put(numbers["stream"]) if settings.streams else None
            return sample(decoder, ids_RC, first_R, limits, settings, numbers["seed"], put)

        found = tf.function(loop, jit_compile=True, autograph=False)() if jit_compile else loop()
        length, memory = found.pop("length"), found.pop("memory")
        if settings.num_beams == 1 and settings.use_cache:
            found["past_key_values"], found["num_cached"] = decoder.cache(memory, length)
        found["sequences"] = found["sequences"][:, :length]
        if "beam_indices" in found:
            found["beam_indices"] = found["beam_indices"][:, : length - prompt.length]
        return found


def _check_combination(settings: Settings, given, jit_compile, disable_compile):
    if settings.streams and settings.num_beams > 1:
        raise ValueError("A streamer needs num_beams=1: beam search knows no token before it has them all.")
    if settings.streams and tf.inside_function():
        raise ValueError("A streamer cannot be called from within a tf.function.")
    if not settings.use_cache and given.get("past_key_values") is not None:
        raise ValueError("use_cache=False contradicts past_key_values.")
    if jit_compile and disable_compile:
        raise ValueError("jit_compile contradicts disable_compile.")
    if jit_compile and (settings.streams or settings.output_scores or settings.output_logits):
        raise ValueError("jit_compile goes with neither a streamer nor output_scores or output_logits.")
    if jit_compile and not settings.use_cache:
        raise ValueError("jit_compile needs use_cache=True: without a cache, no two steps have the same shapes.")


class Graphs:
    """The compiled searches of a model by settings, bucket and structure of the inputs.

    A class, because Keras takes a plain dict for a part of the model's state.
    """

    def __init__(self):
        self._by_key = {}
        self._variables = []

    def on(self, variables: list) -> dict:
        """The graphs that use these variables, by key; empty after a layer was changed, by LoRA for example."""
        is_same = len(variables) == len(self._variables) and all(map(operator.is_, variables, self._variables))
        if not is_same:
            self._by_key, self._variables = {}, variables
        return self._by_key


def _open_spec(prompt: Prompt) -> Prompt:
    """What a prompt is made of, the sizes of batch, text and images left open."""
    return Prompt(
        ids_BT=open_spec(prompt.ids_BT, 0, 1),
        attention_mask_BS=open_spec(prompt.attention_mask_BS, 0, 1),
        embeddings_BTD=None if prompt.embeddings_BTD is None else open_spec(prompt.embeddings_BTD, 0, 1),
        images={name: open_spec(images, 0, 1) for name, images in prompt.images.items()},
        image_mask_BTI=None if prompt.image_mask_BTI is None else open_spec(prompt.image_mask_BTI, 0, 1, 2),
        cache=None if prompt.cache is None else prompt.cache.spec(),
    )


@contextlib.contextmanager
def _streaming(streamer, number, prompt: Prompt):
    """Within, graphs reach the streamer by its number. It gets the prompt first, and is told of the end."""
    key = int(number)
    _streamers[key] = streamer
    try:
        streamer.put(prompt.ids_BT.numpy().astype(np.int64))
        yield
        streamer.end()
    finally:
        del _streamers[key]


def _put(number):
    """An operation that hands ids to the streamer of a number, and gives them back.

    What follows depends on what it gives back, and nothing else would keep a graph from handing them over out of order.
    """

    def put(number, ids_R):
        _streamers[int(number)].put(ids_R.astype(np.int64))
        return ids_R

    return lambda next_R: tf.ensure_shape(tf.numpy_function(put, (number, next_R), tf.int32), next_R.shape)


def _result(found: dict, dtype, as_output: bool):
    found["sequences"] = tf.cast(found["sequences"], dtype)
    if not as_output:
        return found["sequences"]
    if "past_key_values" in found:
        # cropped here, where it is wanted: it copies all keys and values
        found["past_key_values"] = found["past_key_values"].crop(found.pop("num_cached"))
    if "scores" not in found:
        found.pop("sequences_scores", None)
    if tf.executing_eagerly():
        found.update({name: tuple(tf.unstack(found[name])) for name in ("scores", "logits") if name in found})
    return TFIdeficsGenerateOutput.of(**found)


def _mask_of_padding(ids_BT, settings: Settings):
    """All but padding, where the id of padding says nothing else."""
    pad = settings.pad_token_id
    if pad is None or pad in settings.eos_token_ids:
        return tf.ones_like(ids_BT, dtype=tf.bool)
    return ids_BT != pad


def _extended(mask_BTI, text_length, length):
    """An image mask over at least all positions so far, its last row repeated for those that it does not cover."""
    covered = mask_BTI.shape[1]
    if not all(isinstance(size, int) for size in (covered, text_length, length)):
        return mask_BTI
    if covered == length or covered >= text_length:
        return mask_BTI
    return tf.concat((mask_BTI, tf.repeat(mask_BTI[:, -1:], text_length - covered, axis=1)), axis=1)
