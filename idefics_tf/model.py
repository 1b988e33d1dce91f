"""`TFIdeficsModel` and `TFIdeficsForVisionText2Text`: how the parts are wired.

Unusual: keys and values of images are made once, in the call that brings the images, and travel in the cache
(`idefics_tf.cache`); later calls need no image at all. Text-only input runs no vision layer. Rows of text may be a
multiple of rows of images (beams). The decoder's layers are `decoder_layers`, because Keras reserves `Model.layers`.

Mirrors `idefics_pt/model.py`. Axes: see `idefics_common`.
"""

import keras
from keras import ops
from transformers import GenerationConfig

from idefics_common.calls.hidden_states import wanted_hidden_states
from idefics_common.calls.images import check_images, one_form
from idefics_common.calls.text import check_position_ids, check_text
from idefics_common.parameters import num_cross_layers
from idefics_tf.cache import TFIdeficsCache
from idefics_tf.decoder import DecoderLayer
from idefics_tf.freezing import freeze, freeze_base
from idefics_tf.gated_cross_attention import GatedCrossAttentionLayer
from idefics_tf.generation import GenerationMixin, Graphs
from idefics_tf.image_encoding import encode_images
from idefics_tf.image_masks import seen_images
from idefics_tf.image_view import view_images
from idefics_tf.inputs import as_tensors
from idefics_tf.layers import DecoupledEmbedding, DecoupledLinear, RMSNorm, sizes
from idefics_tf.outputs import TFIdeficsCausalLMOutput, TFIdeficsModelOutput
from idefics_tf.perceiver import PerceiverResampler
from idefics_tf.pretrained import TFIdeficsPreTrainedModel
from idefics_tf.rotary import RotaryEmbedding
from idefics_tf.training import CausalLMTrainer, causal_lm_loss, check_labels
from idefics_tf.vision import VisionTransformer


@keras.saving.register_keras_serializable(package="idefics_tf")
class TFIdeficsModel(TFIdeficsPreTrainedModel):
    """The decoder with its vision tower, resampler and gated cross-attention blocks, without a language head."""

    def __init__(self, config, dtype=None, name=None, **kwargs):
        super().__init__(config, dtype, name, **kwargs)
        with self._own_dtype_and_name():
            self.embed_tokens = DecoupledEmbedding(
                config.base_vocab_size,
                config.additional_vocab_size,
                config.hidden_size,
                config.initializer_range,
                padding_idx=config.pad_token_id,
                name="embed_tokens",
            )
            self.vision_model = VisionTransformer(config, name="vision_model")
            if config.use_resampler:
                self.perceiver_resampler = PerceiverResampler(config, name="perceiver_resampler")
            self.decoder_layers = [DecoderLayer(config, name=f"layers_{i}") for i in range(config.num_hidden_layers)]
            self.cross_layer_interval = config.cross_layer_interval
            self.gated_cross_attn_layers = [
                GatedCrossAttentionLayer(config, name=f"gated_cross_attn_layers_{i}")
                for i in range(num_cross_layers(config))
            ]
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, name="norm")
            self.rotary_emb = RotaryEmbedding(config, name="rotary_emb")
        self.build()
        self.apply_freezing()

    def freeze_relevant_params(self, config=None):
        """Freeze as the model's configuration asks, or as `config`, which then becomes the model's."""
        if config is not None:
            self.config = config
        self.apply_freezing()

    def freeze_text_layers(self, module_exceptions=()):
        """Freeze the decoder layers and the final norm but for the kinds of layer named in `module_exceptions`."""
        for layer in (*self.decoder_layers, self.norm):
            freeze(layer, module_exceptions)

    def freeze_vision_layers(self, module_exceptions=()):
        """Freeze the vision tower but for the kinds of layer named in `module_exceptions`."""
        freeze(self.vision_model, module_exceptions)

    def encode_images(self, pixel_values, image_attention_mask=None, interpolate_pos_encoding=False):
        """Encode images once, for any number of later calls.

        Args:
            pixel_values: (B, I, C, height, width), as the processor makes them.
            image_attention_mask: (B, T, I), as the processor makes it; images that no position may see (padding) are
                then not encoded, and their features are zero. By default all are.
            interpolate_pos_encoding: allow other sizes than the model's.

        Returns:
            (B, I, L, E): pass it as `perceiver_embeddings` if the model has a resampler, else, (B, I, P, E), as
            `image_encoder_embeddings`.
        """
        images = {"pixel_values": pixel_values, "image_attention_mask": image_attention_mask}
        images = as_tensors(images, self.config, interpolate_pos_encoding)
        pixel_values = ops.convert_to_tensor(images["pixel_values"])
        image_attention_mask = images["image_attention_mask"]
        check_images("pixel_values", pixel_values.shape, pixel_values.shape[0], self.config)
        seen_BI = None
        if image_attention_mask is not None:
            seen_BI = seen_images(ops.not_equal(image_attention_mask, 0), sizes(pixel_values)[0])
        return encode_images(self, "pixel_values", pixel_values, seen_BI, interpolate_pos_encoding)[0]

    def call(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        image_encoder_embeddings=None,
        perceiver_embeddings=None,
        image_attention_mask=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=False,
        return_dict=None,
        training=False,
    ):
        """Run the decoder over text that may look at images. All inputs may also come as one dict.

        Args:
            input_ids: (B, T) token ids; or inputs_embeds: (B, T, D).
            attention_mask: (B, S), 1 for tokens and 0 for padding, over cached positions too; any dtype.
            position_ids: (B, T); by default counted from the mask, so that padding does not shift positions.
            past_key_values: a `TFIdeficsCache`; images seen by the calls that made it need not be given again.
            pixel_values: (B, I, C, height, width); or image_encoder_embeddings: (B, I, P, E), output of the vision
                tower; or perceiver_embeddings: (B, I, L, E), output of the resampler. None of them for text only, or
                if the cache has seen the images. B may be a divisor of the rows of text: adjacent rows then share
                images. For a cache that has seen images, the mask says what these are: if it covers these alone,
                they are all there are, and replace those in their places; if it covers all, they come after those.
            image_attention_mask: (B, T, I) or over all positions so far, which images each position may see, over
                all images so far; any integer, boolean or float type, not zero = may see. By default made from the
                image tokens if `config.image_token_id` is set, else every position sees all images; where the cache has
                seen images and no new ones come, what the last position saw. New images for such a cache need a mask.
            use_cache: return a cache; by default `config.use_cache`, but not while training.
            output_attentions: return attention weights and gates.
            output_hidden_states: return what enters the first decoder layer, and the hidden states after each layer; an
                index, or several, for those alone, with None in place of the others.
            interpolate_pos_encoding: allow images of another size than the model's.
            return_dict: False for a tuple.
            training: whether dropout is on.

        Returns:
            `TFIdeficsModelOutput`.

        Raises:
            ValueError: on arguments that contradict each other or the model; the message names them.
        """
        check_text(input_ids, inputs_embeds, attention_mask, has_cache=past_key_values is not None)
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if use_cache is None:
            use_cache = self.config.use_cache and not training

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        hidden_BTD = ops.cast(inputs_embeds, self.compute_dtype)
        length = sizes(hidden_BTD)[1]
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        num_keys = length if past_key_values is None else past_key_values.num_keys(length)
        images = view_images(
            self,
            one_form(
                pixel_values=pixel_values,
                image_encoder_embeddings=image_encoder_embeddings,
                perceiver_embeddings=perceiver_embeddings,
            ),
            image_attention_mask,
            None if past_key_values is None else past_key_values.image_memory,
            past_length,
            input_ids,
            hidden_BTD,
            attention_mask,
            interpolate_pos_encoding,
            output_attentions,
            training,
        )
        if position_ids is None:
            position_ids = _positions(attention_mask, past_length, length)
        else:
            check_position_ids(position_ids.shape, hidden_BTD.shape[:2])
        rotation = self.rotary_emb(position_ids)
        attendable_BHTS = _causal_mask(attention_mask, past_length, length, num_keys)
        return_all = output_attentions or use_cache

        wanted = wanted_hidden_states(output_hidden_states, len(self.decoder_layers) + 1)
        hidden_states, attentions, layer_caches = [], [], []
        image_key_values, cross_attentions, gates = [], [], []
        for i, layer in enumerate(self.decoder_layers):
            if i % self.cross_layer_interval == 0:
                hidden_BTD, key_value, weights, gate = self.gated_cross_attn_layers[i // self.cross_layer_interval](
                    hidden_BTD,
                    images.new_BME,
                    images.key_value(i // self.cross_layer_interval),
                    images.mask_BTM,
                    images.gate_BT,
                    return_all=return_all,
                )
                image_key_values.append(key_value)
                cross_attentions.append(weights)
                gates.append(gate)
            if i == 0:
                hidden_states.append(hidden_BTD if 0 in wanted else None)
            past_key_value = None if past_key_values is None else past_key_values.layers[i]
            hidden_BTD, weights, layer_cache = layer(
                hidden_BTD, rotation, attendable_BHTS, past_key_value, return_all=return_all
            )
            hidden_states.append(hidden_BTD if i + 1 in wanted else None)
            attentions.append(weights)
            layer_caches.append(layer_cache)
        hidden_BTD = self.norm(hidden_BTD)
        if len(self.decoder_layers) in wanted:
            hidden_states[-1] = hidden_BTD

        any_image = images.gate_BT is not None
        cache = TFIdeficsCache(tuple(layer_caches), images.memory_with(image_key_values)) if use_cache else None
        output = TFIdeficsModelOutput.of(
            last_hidden_state=hidden_BTD,
            past_key_values=cache,
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
            image_hidden_states=images.hidden_states_BILE,
            cross_attentions=tuple(cross_attentions) if output_attentions and any_image else None,
            cross_attention_gates=tuple(gates) if output_attentions and any_image else None,
            **images.attentions,
        )
        return output.to_tuple() if return_dict is False else output


def _positions(attention_mask, past_length, length):
    """Positions (B or 1, T): counted over what the mask keeps, so that left padding does not shift them."""
    if attention_mask is not None:
        kept_BS = ops.cast(ops.cast(attention_mask, "bool"), "int32")
        positions_BS = ops.cumsum(kept_BS, axis=-1) - 1
        return ops.where(kept_BS == 0, 1, positions_BS)[:, -length:]
    return ops.expand_dims(ops.arange(length) + past_length, 0)


def _causal_mask(attention_mask, past_length, length, num_keys):
    """Boolean (B or 1, 1, T, S): which of `num_keys` positions each position of this call may attend to."""
    query_T1 = ops.expand_dims(ops.arange(length) + past_length, -1)
    mask = ops.expand_dims(ops.arange(num_keys) <= query_T1, (0, 1))
    if attention_mask is None:
        return mask
    covered = attention_mask.shape[-1]
    if len(attention_mask.shape) != 2 or (isinstance(past_length, int) and covered not in (None, num_keys)):
        raise ValueError(
            f"attention_mask must have shape (batch, {num_keys}), over cached positions too; got "
            f"{tuple(attention_mask.shape)}."
        )
    return ops.logical_and(mask, ops.expand_dims(ops.cast(attention_mask, "bool"), (1, 2)))


@keras.saving.register_keras_serializable(package="idefics_tf")
class TFIdeficsForVisionText2Text(GenerationMixin, CausalLMTrainer, TFIdeficsPreTrainedModel):
    """`TFIdeficsModel` with a language head: reads text and images, writes text."""

    has_head = True

    def __init__(self, config, dtype=None, name=None, **kwargs):
        super().__init__(config, dtype, name, **kwargs)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.generation_graphs = Graphs()
        with self._own_dtype_and_name():
            self.model = TFIdeficsModel(config, name="model")
            self.lm_head = DecoupledLinear(
                config.hidden_size,
                config.base_vocab_size,
                config.additional_vocab_size,
                config.initializer_range,
                tied=config.tie_word_embeddings,
                name="lm_head",
            )
        self.build()
        self.apply_freezing()

    def apply_freezing(self):
        self.model.apply_freezing()
        if self.config.freeze_lm_head:
            freeze_base(self.model.embed_tokens if self.lm_head.tied else self.lm_head)

    def logits_of(self, hidden_BTD):
        """Logits (B, T, V) of the hidden states that `model` returns."""
        return self.lm_head(hidden_BTD, tied_to=self.model.embed_tokens if self.lm_head.tied else None)

    def encode_images(self, pixel_values, image_attention_mask=None, interpolate_pos_encoding=False):
        """See `TFIdeficsModel.encode_images`."""
        return self.model.encode_images(pixel_values, image_attention_mask, interpolate_pos_encoding)

    def call(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        pixel_values=None,
        image_encoder_embeddings=None,
        perceiver_embeddings=None,
        image_attention_mask=None,
        labels=None,
        use_cache=None,
        output_attentions=None,
        output_hidden_states=None,
        interpolate_pos_encoding=False,
        return_dict=None,
        training=False,
    ):
        """Predict the next token at each position; arguments that are not listed here are `TFIdeficsModel.call`'s.

        Args:
            labels: (B, T) ids, -100 where a token is not to be predicted. The model shifts them. Padding is not masked
                here but by whoever makes the labels (the processor or the collator).

        Returns:
            `TFIdeficsCausalLMOutput`.

        Raises:
            ValueError: as `TFIdeficsModel.call`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_encoder_embeddings=image_encoder_embeddings,
            perceiver_embeddings=perceiver_embeddings,
            image_attention_mask=image_attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
            training=training,
        )
        logits_BTV = self.logits_of(outputs.last_hidden_state)
        if labels is not None:
            check_labels(labels, logits_BTV)
        fields = outputs.keys()
        output = TFIdeficsCausalLMOutput.of(
            # the width of the logits, not `vocab_size`: labels may be of the additional vocabulary
            loss=None if labels is None else causal_lm_loss(logits_BTV, labels),
            logits=logits_BTV,
            **{name: outputs[name] for name in fields if name != "last_hidden_state"},
        )
        return output.to_tuple() if return_dict is False else output
