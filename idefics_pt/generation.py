"""What `generate` of transformers has to know about images.

Unusual: images are not repeated for beams or for several samples of a prompt; the model lets the rows of one prompt
share them. After the first step images are in the cache, or, without a cache, kept as encoded states, so that no step
encodes them again.

Mirrors `idefics_tf/generation.py`. Axes: see `idefics_common`.
"""

import inspect

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.logits_process import (
    PrefixConstrainedLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from idefics_pt.arguments import PASSED_ON
from idefics_pt.beams import read_prompts_once
from idefics_pt.cache import recall_images
from idefics_pt.generation_options import check_model_arguments, check_options, refuse_continuous_batching
from idefics_pt.growing_cache import GrowingCache
from idefics_pt.image_masks import mask_from_tokens
from idefics_pt.transformers_versions import CACHE, given_cache, takes_either_name

_IMAGES = ("pixel_values", "image_encoder_embeddings", "perceiver_embeddings")


class IdeficsGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a decoder that looks at images."""

    generate = takes_either_name(GenerationMixin.generate)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused, and with it `generate_batch` and `cache_implementation="paged"`: they would leave images out."""
        refuse_continuous_batching()

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        check_options(self, generation_mode, generation_config, generation_mode_kwargs)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        super()._validate_model_kwargs(model_kwargs)
        check_model_arguments(model_kwargs, {*inspect.signature(self.forward).parameters, *PASSED_ON})

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        inputs_embeds=None,  # because it is named here, `generate` knows that it may be given embeddings
        image_attention_mask=None,
        is_first_iteration=False,
        cache=None,
        **kwargs,
    ):
        cache = given_cache(past_key_values, cache)
        images = {name: kwargs.pop(name, None) for name in _IMAGES}
        kwargs.pop("tokenizer", None)  # stopping criteria have read it; transformers leaves it to the model as well
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            **{CACHE: cache},
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        length = tokens.shape[1]
        past_length = 0 if cache is None else cache.get_seq_length()
        # images for an empty cache mean a first step too: decoding loops of others may not say so. Without images the
        # length of a static cache is not asked, which would stop an accelerator at every token.
        has_images = any(value is not None for value in images.values())
        if is_first_iteration or (has_images and recall_images(cache) is None and int(past_length) == 0):
            inputs.update(images)
            past_length = int(past_length)
            inputs["image_attention_mask"] = _extended(image_attention_mask, past_length, length)
        elif recall_images(cache) is not None and image_attention_mask is not None:
            # what is generated sees what the end of the prompt saw; the image tokens themselves are never generated
            inputs["image_attention_mask"] = image_attention_mask[:, -1:].expand(-1, length, -1)
        return inputs

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        given = model_kwargs.get(CACHE)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if given is None and type(cache) is DynamicCache and not cache.offloading:
            model_kwargs[CACHE] = GrowingCache()

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        shared = {name: model_kwargs.pop(name) for name in _IMAGES if name in model_kwargs}
        images = next((value for value in shared.values() if value is not None), None)
        token = getattr(self.config, "image_token_id", None)
        given = (model_kwargs.get(name) for name in ("image_attention_mask", "inputs_embeds", CACHE))
        if images is not None and token is not None and all(value is None for value in given):
            # now, of the prompt alone: candidates of assisted decoding may hold image tokens, and are read with it
            mask = mask_from_tokens(input_ids, token, self.config.eos_token_id, images.shape[1])
            model_kwargs["image_attention_mask"] = mask
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **shared}

    def _get_logits_processor(self, generation_config, *args, negative_prompt_ids=None, **kwargs):
        if negative_prompt_ids is not None and generation_config.guidance_scale in (None, 1):
            raise ValueError("negative_prompt_ids are for guidance_scale, which is not set.")
        processors = super()._get_logits_processor(
            generation_config, *args, negative_prompt_ids=negative_prompt_ids, **kwargs
        )
        samples = generation_config.num_return_sequences
        for processor in processors:
            if isinstance(processor, PrefixConstrainedLogitsProcessor):
                # transformers 5.23 tells the samples of a prompt apart as if each were a prompt of its own
                processor._num_beams = max(generation_config.num_beams, samples)
            elif isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                context = processor.unconditional_context
                for name in ("input_ids", "attention_mask"):
                    if context[name] is not None:
                        context[name] = context[name].repeat_interleave(samples, dim=0)
        return processors

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        _check_cached_text(input_ids, model_kwargs)
        if generation_config.prefill_chunk_size is not None:
            model_kwargs = self._ready_for_chunks(input_ids, model_kwargs)
        prefill = super()._prefill
        return read_prompts_once(prefill, input_ids, generation_config, model_kwargs, _IMAGES, *args, **kwargs)

    def _ready_for_chunks(self, input_ids, model_kwargs):
        """Encode pixels, so that each chunk of a prompt gets features, and make the mask say all positions."""
        given = {name: model_kwargs.get(name) for name in _IMAGES}
        images = next((value for value in given.values() if value is not None), None)
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("image_attention_mask")
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError("prefill_chunk_size splits input_ids; inputs_embeds are read at once: leave it out.")
        if images is None:
            return model_kwargs
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError("prefill_chunk_size does not go with images for a cache that holds text: leave it out.")
        if mask is None:
            mask = torch.ones((*input_ids.shape, images.shape[1]), dtype=torch.bool, device=images.device)
        model_kwargs = {**model_kwargs, "image_attention_mask": mask}
        if given["pixel_values"] is not None:
            of_any_size = model_kwargs.get("interpolate_pos_encoding", False)
            model_kwargs[self._form_of_features] = self.encode_images(given["pixel_values"], mask, of_any_size)
            model_kwargs["pixel_values"] = None
        return model_kwargs

    @property
    def _form_of_features(self):
        return "perceiver_embeddings" if self.config.use_resampler else "image_encoder_embeddings"

    def compute_transition_scores(self, sequences, scores, beam_indices=None, normalize_logits=False):
        """What `generate` gave each token that it chose; see `GenerationMixin.compute_transition_scores`.

        Here over the whole vocabulary, as wide as the scores are; transformers' takes `vocab_size` for their width.

        Args:
            sequences: (rows, length) of the result. scores: a tensor (rows or beams, whole vocabulary) for each step.
            beam_indices: (rows, steps or more), which beam each token is of, -1 behind the end; None without beams.
            normalize_logits: take the logarithm of the softmax of `scores`.

        Returns:
            (rows, steps), 0 behind the end.
        """
        scores_RNV = torch.stack(tuple(scores), dim=1)
        if normalize_logits:
            scores_RNV = scores_RNV.log_softmax(dim=-1)
        if beam_indices is None:
            beam_indices = torch.arange(len(scores_RNV)).unsqueeze(1).expand(-1, scores_RNV.shape[1])
        beams_RN = beam_indices.to(scores_RNV.device)
        beams_RN = beams_RN[:, : int((beams_RN >= 0).sum(dim=1).max())]
        length = beams_RN.shape[1]
        tokens_RN = sequences[:, sequences.shape[1] - length :].to(scores_RNV.device)
        steps = torch.arange(length, device=scores_RNV.device)
        return scores_RNV[beams_RN.clamp(min=0), steps, tokens_RN].masked_fill(beams_RN < 0, 0.0)

    def _get_candidate_generator(self, *args, **kwargs):
        candidates = super()._get_candidate_generator(*args, **kwargs)
        if hasattr(candidates, "vocab_size"):
            # prompt lookup is told the base vocabulary's size only, and stops at a token of the additional one
            candidates.vocab_size = self.config.vocab_size + self.config.additional_vocab_size
        return candidates

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder=is_encoder_decoder, **kwargs
        )
        if model_kwargs.get(CACHE) is None and outputs.image_hidden_states is not None:
            for name in _IMAGES:
                model_kwargs.pop(name, None)
            model_kwargs[self._form_of_features] = outputs.image_hidden_states
        return model_kwargs


def _check_cached_text(input_ids, model_kwargs) -> None:
    """Refuse a cache whose text is not the beginning of this prompt's.

    One that holds as much text as the prompt, or more: transformers takes the prompt for all of the text so far, and
    would read any part of it again, behind what the cache holds. And one with other rows than the beams.

    Raises:
        ValueError: naming both lengths, or both numbers of rows.
    """
    cache, mask, embeddings = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "inputs_embeds"))
    length = input_ids.shape[1] if embeddings is None else embeddings.shape[1]
    is_all = mask is None or mask.shape[1] == length
    if cache is not None and is_all and (past_length := int(cache.get_seq_length())) and past_length >= length:
        raise ValueError(
            f"The cache holds {past_length} positions of text and the prompt has {length}: give the whole text so far "
            "and what follows, or what follows alone with an attention_mask over the whole; for another text, "
            "cache.reset() or a new cache."
        )
    first = cache.layers[0] if cache is not None and getattr(cache, "layers", None) else None
    keys = getattr(first, "keys", None)
    if (
        isinstance(keys, torch.Tensor)
        and keys.dim() == 4
        and len(keys) != len(input_ids)
        and cache.get_seq_length() > 0
    ):
        raise ValueError(
            f"The cache holds the text of {len(keys)} rows, expected {len(input_ids)}, one for each beam or sample of "
            "a prompt: call cache.batch_repeat_interleave(num_beams or num_return_sequences) first (a StaticCache has "
            "no such method: use a DynamicCache)."
        )


def _extended(mask_BTI, past_length: int, length: int):
    """An image mask over at least all positions so far, its last row repeated for those that it does not cover."""
    if mask_BTI is None or mask_BTI.shape[1] == length:
        return mask_BTI
    missing = past_length + length - mask_BTI.shape[1]
    if missing <= 0:
        return mask_BTI
    return torch.cat((mask_BTI, mask_BTI[:, -1:].expand(-1, missing, -1)), dim=1)
