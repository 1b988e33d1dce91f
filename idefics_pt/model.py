"""`IdeficsModel` and `IdeficsForVisionText2Text`: how the parts are wired.

Unusual: keys and values of images are made once, in the call that brings the images, and travel on the cache
(`idefics_pt.cache`); later calls need no image at all. Text-only input runs no vision module. Rows of text may be a
multiple of rows of images (beams).

Mirrors `idefics_tf/model.py`. Axes: see `idefics_common`.
"""

import warnings

import torch
from torch import nn
from transformers.masking_utils import create_causal_mask
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import can_return_tuple

from idefics_common.calls.hidden_states import wanted_hidden_states
from idefics_common.calls.images import check_images, one_form
from idefics_common.calls.text import check_mask_over_cache, check_text
from idefics_pt.arguments import check_labels, stack_level, warn_of_unknown
from idefics_pt.decoder import DecoderLayer
from idefics_pt.freezing import freeze
from idefics_pt.gated_cross_attention import GatedCrossAttentionLayer
from idefics_pt.generation import IdeficsGenerationMixin
from idefics_pt.growing_cache import GrowingCache
from idefics_pt.image_encoding import encode_images
from idefics_pt.image_masks import seen_images
from idefics_pt.image_view import view_images
from idefics_pt.joined import Decoupled
from idefics_pt.layers import DecoupledEmbedding, DecoupledLinear, RMSNorm
from idefics_pt.outputs import IdeficsCausalLMOutput, IdeficsModelOutput
from idefics_pt.perceiver import PerceiverResampler
from idefics_pt.pretrained import IdeficsPreTrainedModel
from idefics_pt.quantizers import whole_vocabulary
from idefics_pt.rotary import RotaryEmbedding
from idefics_pt.transformers_versions import CACHE, given_cache
from idefics_pt.vision import VisionTransformer


class IdeficsModel(IdeficsPreTrainedModel):
    """The decoder with its vision tower, resampler and gated cross-attention blocks, without a language head."""

    _keys_to_ignore_on_load_unexpected = IdeficsPreTrainedModel._keys_to_ignore_on_load_unexpected | {r"^lm_head\."}

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = DecoupledEmbedding(
            config.base_vocab_size,
            config.additional_vocab_size,
            config.hidden_size,
            freeze_base=config.freeze_text_layers,
            padding_idx=config.pad_token_id,
        )
        self.vision_model = VisionTransformer(config)
        if config.use_resampler:
            self.perceiver_resampler = PerceiverResampler(config)
        self.layers = nn.ModuleList(DecoderLayer(config, layer_idx=i) for i in range(config.num_hidden_layers))
        self.cross_layer_interval = config.cross_layer_interval
        self.gated_cross_attn_layers = nn.ModuleList(
            GatedCrossAttentionLayer(config) for _ in range(config.num_hidden_layers // config.cross_layer_interval)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.post_init()
        self.apply_freezing()

    def freeze_relevant_params(self, config=None):
        """Freeze as the model's configuration asks, or as `config`, which then becomes the model's."""
        if config is not None:
            self.config = config
        self.apply_freezing()

    def freeze_text_layers(self, module_exceptions=()):
        """Freeze the decoder layers and the final norm but for the kinds of module named in `module_exceptions`."""
        for module in (self.layers, self.norm):
            freeze(module, module_exceptions)

    def freeze_vision_layers(self, module_exceptions=()):
        """Freeze the vision tower but for the kinds of module named in `module_exceptions`."""
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
        rows, seen_BI = len(pixel_values), None
        check_images("pixel_values", pixel_values.shape, rows, self.config)
        if image_attention_mask is not None:
            seen_BI = seen_images(image_attention_mask != 0, rows)
        return encode_images(self, "pixel_values", pixel_values, seen_BI, interpolate_pos_encoding)[0]

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    @can_return_tuple
    def forward(
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
        cache_position=None,
        cache=None,
        **kwargs,
    ):
        """Run the decoder over text that may look at images.

        Args:
            input_ids: (B, T) token ids; or inputs_embeds: (B, T, D).
            attention_mask: (B, S), 1 for tokens and 0 for padding, over cached positions too; or a 4-D mask as
                transformers' attention functions take it.
            position_ids: (B, T); by default counted from the mask, so that padding does not shift positions.
            past_key_values, or cache: a `Cache`; images seen by the calls that filled it need not be given again.
            pixel_values: (B, I, C, height, width); or image_encoder_embeddings: (B, I, P, E), output of the vision
                tower; or perceiver_embeddings: (B, I, L, E), output of the resampler. None of them for text only, or
                if the cache has seen the images. B may be a divisor of the rows of text: adjacent rows then share
                images. For a cache that has seen images, the mask says what these are: if it covers these alone,
                they are all there are, and replace those in their places; if it covers all, they come after those.
            image_attention_mask: (B, T, I) or over all positions so far, which images each position may see, over
                all images so far; any integer, boolean or float type, not zero = may see. By default made from the
                image tokens if `config.image_token_id` is set, else every position sees all images; where the cache has
                seen images and no new ones come, what the last position saw. New images for such a cache need a mask.
            use_cache: return a cache; by default `config.use_cache`, but not while training, nor in `nn.DataParallel`.
            output_attentions: return attention weights and gates, which needs the `eager` implementation; with another
                one none are returned, and a warning says what to switch.
            output_hidden_states: return what enters the first decoder layer, and the hidden states after each layer; an
                index, or several, for those alone, with None in place of the others.
            interpolate_pos_encoding: allow images of another size than the model's.
            cache_position: (T,) positions, used if `position_ids` and `attention_mask` do not say them.
            return_dict: False for a tuple.

        Returns:
            `IdeficsModelOutput`.

        Raises:
            ValueError: on arguments that contradict each other or the model; the message names them.
        """
        cache = given_cache(past_key_values, cache)
        # flex attention has a class of its own for masks
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
        check_text(input_ids, inputs_embeds, mask, has_cache=cache is not None, mask_axes=(2, 4))
        warn_of_unknown(kwargs)
        output_attentions = self._settle_output_attentions(output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        is_replica = getattr(self, "_is_replica", False)  # so `nn.DataParallel` marks its copies of a model
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not is_replica

        hidden_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = GrowingCache()
        past_length = 0 if cache is None else cache.get_seq_length()
        if mask is not None and isinstance(past_length, int) and not torch.compiler.is_compiling():
            check_mask_over_cache(mask.shape, past_length, hidden_BTD.shape[1])
        images = view_images(
            self,
            one_form(
                pixel_values=pixel_values,
                image_encoder_embeddings=image_encoder_embeddings,
                perceiver_embeddings=perceiver_embeddings,
            ),
            image_attention_mask,
            cache,
            past_length,
            input_ids,
            hidden_BTD,
            mask,
            interpolate_pos_encoding,
        )
        if is_replica and cache is not None and images.gate_BT is not None:
            raise ValueError(
                "nn.DataParallel puts the caches of its replicas together without their images: leave out use_cache "
                "and the cache, or call the model that it wraps."
            )
        positions_BT = position_ids
        if positions_BT is None:
            positions_BT = _positions(attention_mask, cache_position, past_length, hidden_BTD)
        rotation = self.rotary_emb(hidden_BTD, positions_BT)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_BTD,
            attention_mask=attention_mask,
            **{CACHE: cache},
            position_ids=position_ids,  # only a caller's own can be those of packed texts
            # whether a mask can be left out is a question to its values, and would stop an accelerator at every token
            allow_is_causal_skip=hidden_BTD.shape[1] > 1 or attention_mask is None or hidden_BTD.device.type == "cpu",
        )

        wanted = wanted_hidden_states(output_hidden_states, len(self.layers) + 1)
        hidden_states, attentions = [], []
        image_key_values, cross_attentions, gates = [], [], []
        for i, layer in enumerate(self.layers):
            if i % self.cross_layer_interval == 0:
                hidden_BTD, key_value, weights, gate = self.gated_cross_attn_layers[i // self.cross_layer_interval](
                    hidden_BTD,
                    images.new_BME,
                    images.key_value(i // self.cross_layer_interval),
                    images.mask_BTM,
                    images.gate_BT,
                )
                image_key_values.append(key_value)
                cross_attentions.append(weights)
                gates.append(gate)
            if i == 0:
                hidden_states.append(hidden_BTD if 0 in wanted else None)
            hidden_BTD, weights = layer(hidden_BTD, rotation, causal_mask, **{CACHE: cache}, **kwargs)
            hidden_states.append(hidden_BTD if i + 1 in wanted else None)
            attentions.append(weights)
        hidden_BTD = self.norm(hidden_BTD)
        if len(self.layers) in wanted:
            hidden_states[-1] = hidden_BTD

        if cache is not None:
            images.remember_on(cache, image_key_values)
        any_image = images.gate_BT is not None
        return IdeficsModelOutput(
            last_hidden_state=hidden_BTD,
            **{CACHE: cache},
            hidden_states=tuple(hidden_states) if wanted else None,
            attentions=tuple(attentions) if output_attentions else None,
            image_hidden_states=images.hidden_states_BILE,
            cross_attentions=tuple(cross_attentions) if output_attentions and any_image else None,
            cross_attention_gates=tuple(gates) if output_attentions and any_image else None,
            **(images.attentions if output_attentions else {}),
        )

    def _settle_output_attentions(self, output_attentions):
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        implementation = self.config._attn_implementation
        if not output_attentions or implementation == "eager":
            return output_attentions
        if not torch.compiler.is_compiling():
            # a warning, not an error: code that asks every model for its attentions, as transformers' own does, goes on
            warnings.warn(
                f"output_attentions=True returns no attentions: {implementation!r} does not compute the weights. Call "
                '`model.set_attn_implementation("eager")`, or load the model with `attn_implementation="eager"`.',
                stacklevel=stack_level(),
            )
        return False


def _positions(attention_mask, cache_position, past_length, hidden_BTD):
    """Positions (B or 1, T): counted over what the mask keeps, so that left padding does not shift them."""
    length = hidden_BTD.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        positions_BS = attention_mask.long().cumsum(dim=-1) - 1
        return positions_BS.masked_fill(attention_mask == 0, 1)[:, -length:]
    if cache_position is not None:
        return cache_position.unsqueeze(0)
    return (torch.arange(length, device=hidden_BTD.device) + past_length).unsqueeze(0)


class IdeficsForVisionText2Text(IdeficsGenerationMixin, IdeficsPreTrainedModel):
    """`IdeficsModel` with a language head: reads text and images, writes text."""

    _has_head = True
    # `Trainer` smooths the labels of classes of these names one token ahead, and of others in place. The key is none
    # of a configuration, so `Auto...` classes do not see it. Around virtual tokens of PEFT it asks for the inner class.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["idefics_pt"] = "IdeficsForVisionText2Text"
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["idefics_pt.IdeficsModel"] = IdeficsModel.__name__
    _tp_plan = {"lm_head": "decoupled_linear"}  # noqa: RUF012

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[f"idefics_pt.{cls.__name__}"] = cls.__name__

    def __init__(self, config):
        super().__init__(config)
        self.model = IdeficsModel(config)
        self.lm_head = DecoupledLinear(
            config.hidden_size,
            config.base_vocab_size,
            config.additional_vocab_size,
            freeze_base=config.freeze_lm_head,
        )
        self.loss_type = "ForCausalLM"  # how transformers' registry of losses calls next-token cross entropy
        self.post_init()
        self.apply_freezing()

    @property
    def _tied_weights_keys(self):
        ties = {"lm_head.weight": "model.embed_tokens.weight"}
        # PEFT looks for what is tied to a layer that it adapts, and those are joined
        _, *inner = self.get_input_embeddings().modules()
        is_adapted = any(isinstance(module, Decoupled) for module in inner)
        if self.config.additional_vocab_size > 0 and not is_adapted:
            ties["lm_head.additional_fc.weight"] = "model.embed_tokens.additional_embedding.weight"
        return ties

    def apply_freezing(self):
        super().apply_freezing()
        if self.config.freeze_lm_head:
            self.lm_head.weight.requires_grad_(False)

    def encode_images(self, pixel_values, image_attention_mask=None, interpolate_pos_encoding=False):
        """See `IdeficsModel.encode_images`."""
        return self.model.encode_images(pixel_values, image_attention_mask, interpolate_pos_encoding)

    @can_return_tuple
    def forward(
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
        cache_position=None,
        logits_to_keep=0,
        cache=None,
        **kwargs,
    ):
        """Predict the next token at each position; arguments that are not listed here are `IdeficsModel.forward`'s.

        Args:
            labels: (B, T) ids, -100 where a token is not to be predicted. The model shifts them. Padding is not masked
                here but by whoever makes the labels (the processor or the collator).
            logits_to_keep: how many last positions to compute logits for, 0 for all; or a tensor of positions.
            num_items_in_batch: number of labels that the loss is a mean over, when a batch is split into several
                calls; by default those of this call.

        Returns:
            `IdeficsCausalLMOutput`.

        Raises:
            ValueError: as `IdeficsModel.forward`.
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
            cache_position=cache_position,
            cache=cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_BTD = outputs.last_hidden_state[:, kept]
        logits_BTV = whole_vocabulary(self.lm_head, hidden_BTD, self.lm_head(hidden_BTD), self.config)
        loss = None
        if labels is not None:
            check_labels(labels, logits_BTV)
            # the width of the logits, not `vocab_size`: labels may be of the additional vocabulary
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=logits_BTV.shape[-1], **kwargs)
        return IdeficsCausalLMOutput(
            loss=loss,
            logits=logits_BTV,
            **{name: value for name, value in outputs.items() if name != "last_hidden_state"},
        )
