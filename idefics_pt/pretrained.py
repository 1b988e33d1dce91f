"""`IdeficsPreTrainedModel`: what the models need from `PreTrainedModel`: initialisation, loading, freezing.

Unusual: loading is strict. A checkpoint that lacks a tensor, has one that the model does not, or has one of another
shape is an error that names it, unless the caller asks for the report (`output_loading_info=True`) or passes
`strict=False`. Freezing is applied again after loading, which would otherwise undo it.

Mirrors `idefics_tf/pretrained.py`.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from idefics_common.configuration.config import IdeficsConfig
from idefics_common.configuration.fields import check_fields
from idefics_common.configuration.vocabulary import additional_size
from idefics_pt.attention import SelfAttention
from idefics_pt.cpu.int8 import is_quantized, quantize_int8
from idefics_pt.decoder import DecoderLayer
from idefics_pt.freezing import freeze_as_configured
from idefics_pt.fused import Fusable
from idefics_pt.gated_cross_attention import GatedCrossAttentionLayer
from idefics_pt.joined import Decoupled, join_vocabulary, reads_head
from idefics_pt.layers import DecoupledLinear
from idefics_pt.perceiver import PerceiverResampler
from idefics_pt.quantizers import check_loaded_layers, mend_four_bits, refuse_quantized
from idefics_pt.resizing import (
    as_decoupled,
    check_resizable,
    resize_additional_embedding,
    resize_additional_outputs,
)
from idefics_pt.tensor_parallel import register_styles
from idefics_pt.vision import VisionEmbeddings
from idefics_pt.weights import check_files, check_loading_info

register_styles()


class IdeficsPreTrainedModel(PreTrainedModel):
    """Base of the IDEFICS models in PyTorch; see `transformers.PreTrainedModel`."""

    config_class = IdeficsConfig
    config: IdeficsConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = [  # noqa: RUF012
        "DecoderLayer",
        "GatedCrossAttentionLayer",
        "PerceiverResampler",
        "VisionEmbeddings",
        "VisionEncoderLayer",
    ]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = {r"\.rotary_emb\.inv_freq$", r"\.embeddings\.position_ids$"}  # noqa: RUF012
    _has_head = False
    has_virtual_tokens = False
    """Whether PEFT puts virtual tokens in front of the text: prompt tuning, P-tuning and their like."""
    is_of_trl = False
    """Whether a trainer of TRL has put its forward in the place of the model's: some of them give no image mask."""
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # for tools that ask what a model can return; the models collect these themselves
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": SelfAttention}  # noqa: RUF012

    def __init__(self, config, *args, **kwargs):
        check_fields(config)
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, strict=True, output_loading_info=False, **kwargs):
        """Load a model; see `transformers.PreTrainedModel.from_pretrained` for everything else.

        Args:
            strict: refuse a checkpoint that does not fit the model exactly. Tied tensors may be absent, and rotary
                frequencies and position indices of older checkpoints may be present.
            output_loading_info: return the report instead of refusing.
            quantization_config: how to quantise, or, for a checkpoint that is quantised, how it is.

        Raises:
            CheckpointError: a ValueError: local files are damaged or incomplete, tensors are missing, unexpected or of
                another shape, or not quantised as config.json says; the message names files and tensors.
            ValueError: if `quantization_config` contradicts the checkpoint's, or bitsandbytes would compute it wrongly.
        """
        options = kwargs
        demanding = strict and not output_loading_info and kwargs.get("state_dict") is None
        forgiven = kwargs.get("ignore_mismatched_sizes", False)
        found_shapes = {}
        if pretrained_model_name_or_path is not None and kwargs.get("state_dict") is None:
            with_head = cls._has_head if demanding and not forgiven else None
            found_shapes = check_files(pretrained_model_name_or_path, kwargs, with_head)
        if demanding and pretrained_model_name_or_path is not None:
            # transformers then reports tensors of another shape with all the rest, instead of stopping at them
            options = {"ignore_mismatched_sizes": True, **kwargs}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **options)
        if demanding:
            check_loading_info(model, info, pretrained_model_name_or_path, found_shapes, forgiven)
        check_loaded_layers(model, pretrained_model_name_or_path)
        if getattr(model, "hf_quantizer", None) is not None:
            mend_four_bits(model)
            # how tensors became layers; saving would undo it, which fails, and need not: the state has the file's names
            model._weight_conversions = None
        model.apply_freezing()
        return (model, info) if output_loading_info else model

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """Split a model over devices before its weights are loaded; see `transformers.distributed.mixin`.

        FSDP2 has to find tied weights tied already, and in one unit. transformers 5.23 ties them after loading: then
        two units shard one tensor, and its gradient is wrong where rows do not divide evenly among the processes.
        """
        if mesh_manager is not None and distributed_config.dp_size > 1:
            model.tie_weights(recompute_mapping=False)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    def enable_input_require_grads(self):
        """Let gradients reach adapters and layers that train behind frozen inputs; see `PreTrainedModel`.

        Reentrant checkpointing gives a layer gradients only if its input wants one. Here the input of the vision
        layers, too, unless they are all frozen: then there is no gradient to compute.
        """
        super().enable_input_require_grads()
        vision = self.base_model.vision_model

        def require_grads(module, inputs, output):
            if any(parameter.requires_grad for parameter in vision.encoder.parameters()):
                output.requires_grad_(True)

        self._require_grads_hooks.append(vision.pre_layrnorm.register_forward_hook(require_grads))

    def apply_freezing(self):
        """Freeze parameters as the configuration asks; done by the constructor and by `from_pretrained`."""
        freeze_as_configured(self.base_model)

    def fuse_projections(self):
        """Make decoding faster: one product for queries, keys and values, and one for gate and up, in each layer.
        On the CPU, tall weights also come to lie in the order in which they are read faster.

        For inference, after loading and, if the model is offloaded, after that. `deepcopy`, `to` and `save_pretrained`
        are as ever; `state_dict` has all weights, as copies. `train`, `load_state_dict`, `save_pretrained`,
        `quantize_int8` and `unfuse_projections` undo it. Layers with hooks, adapters, or of another class are left
        alone. While projections are fused, gradients of their weights are refused, and so are adapters and other
        changes of the layers. Compiled calls are for `torch.no_grad`.
        """
        for module in self._fusable_modules():
            module.fuse_projections()

    def unfuse_projections(self):
        """Undo `fuse_projections`: every linear layer with a weight of its own.

        Raises:
            ValueError: if a fused layer was meanwhile replaced, by a quantised one for example.
        """
        for module in self._fusable_modules():
            module.unfuse_projections()

    def _fusable_modules(self):
        # an embedding that the head is tied to reads rows
        kinds = Fusable if self.config.tie_word_embeddings else (Fusable, DecoupledLinear)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def train(self, mode=True):
        """See `torch.nn.Module.train`; training undoes `fuse_projections`."""
        if mode:
            self.unfuse_projections()
        return super().train(mode)

    def quantize_int8(self):
        """Make decoding on the CPU faster and the model smaller: int8 weights and activations in the decoder and head.

        For inference, after loading; not to be undone. docs/generation.md says what it costs in accuracy.

        Raises:
            ValueError: if the model is not on the CPU, has adapters, or is quantised already.
        """
        quantize_int8(self)

    def dequantize(self, dtype=None):
        """See `PreTrainedModel.dequantize`; by default to the model's dtype."""
        return super().dequantize(self.dtype if dtype is None else dtype)

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, **kwargs):
        """Save the model; see `transformers.PreTrainedModel.save_pretrained`.

        With `distributed_checkpoint=True` each process saves its pieces of the tensors. What one process has alone are
        no pieces, and is saved as ever.

        Raises:
            ValueError: if the model is quantised, unless `from_pretrained` did it with a tool that saves.
        """
        if is_quantized(self):
            raise ValueError("A model quantised to int8 is not saved: save it before, or load the checkpoint again.")
        self.unfuse_projections()
        if state_dict is None and any(name.endswith("._orig_mod") for name, _ in self.named_modules()):
            # what `torch.compile` made of a part and was put in its place has names of its own
            state_dict = {name.replace("_orig_mod.", ""): tensor for name, tensor in self.state_dict().items()}
        if getattr(self, "hf_quantizer", None) is None:
            refuse_quantized(
                self.state_dict() if state_dict is None else state_dict,
                "config.json could not say how, and nothing would load it. Save the model before quantising, and "
                "quantise it after loading; or let from_pretrained(quantization_config=...) quantise.",
            )
        split = getattr(self.config, "distributed_config", None)
        if split is not None and split.tp_size <= 1 and split.dp_size <= 1:
            kwargs.pop("distributed_checkpoint", None)
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Switch the attention of all parts, text, cross, vision and resampler; see `transformers.PreTrainedModel`."""
        if isinstance(attn_implementation, str):
            known = self.get_correct_attn_implementation(attn_implementation)
            # the two image modules follow this model's configuration and are no submodels: transformers would warn
            self.config.vision_config._attn_implementation_internal = known
            self.config.perceiver_config._attn_implementation_internal = known
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def join_vocabulary(self):
        """Let `weight` of the embedding and of the head hold the additional vocabulary too, behind the base one.

        For tools that read either as the whole vocabulary. Results, files and `vocab_size` stay as they are. Adapters
        of PEFT and trainers of TRL do so themselves.

        Raises:
            ValueError: if the additional vocabulary trains and the base one does not, or if they are quantised, sharded
                or adapted.
        """
        join_vocabulary([module for module in self.modules() if isinstance(module, Decoupled)])

    def __setattr__(self, name, value):
        if name == "forward":
            self._join_head_for(value)
        super().__setattr__(name, value)

    def _join_head_for(self, forward):
        """Join the language head if `forward` multiplies by its weight itself.

        Raises:
            ValueError: as `join_vocabulary`; or if a tool's own layer, with the base rows alone, is in its place.
        """
        if not self._has_head or not reads_head(forward):
            return
        heads = [module for module in self.modules() if isinstance(module, DecoupledLinear)]
        if not heads and self.config.additional_vocab_size > 0:
            raise ValueError(
                f"TRL multiplies by lm_head.weight itself, and lm_head is a {type(self.lm_head).__name__}, without "
                f"the {self.config.additional_vocab_size} rows of the additional vocabulary. Leave lm_head out when "
                "layers are quantised or replaced."
            )
        join_vocabulary(heads)
        self.base_model.is_of_trl = True

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Change the size of the vocabulary; ids keep their meaning and trained rows are kept.

        Args:
            new_num_tokens: size of the whole vocabulary. With an additional vocabulary, that one takes the change and
                becomes ``new_num_tokens - vocab_size``; without, the base matrix does, as in transformers.
            pad_to_multiple_of: round the whole up to a multiple of this.
            mean_resizing: start new rows at the mean of the base rows instead of at random.

        Returns:
            the embedding layer.

        Raises:
            ValueError: if there is an additional vocabulary and `new_num_tokens` is below `vocab_size`, or if the
                embedding or the head is quantised or, with an additional vocabulary, adapted.
        """
        for part in (self.get_input_embeddings(), self.get_output_embeddings()):
            if part is not None and new_num_tokens is not None:
                refuse_quantized(part.state_dict(), "resize the vocabulary before quantising it.")
        if self.config.additional_vocab_size == 0:
            embedding = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            head = self.get_output_embeddings()
            if isinstance(head, nn.Linear) and not isinstance(head, DecoupledLinear):
                self.set_output_embeddings(as_decoupled(head))
            return embedding
        size = additional_size(self.config, new_num_tokens, pad_to_multiple_of)
        if size == self.config.additional_vocab_size:
            return self.get_input_embeddings()
        std = None if mean_resizing else self.config.initializer_range
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        check_resizable(part for part in (embedding, head) if part is not None)
        resize_additional_embedding(embedding, size, std)
        if head is not None:
            resize_additional_outputs(head, size, std)
        self.config.additional_vocab_size = size
        self.all_tied_weights_keys = self.get_expanded_tied_weights_keys(all_submodels=False)
        self.tie_weights()
        self._join_head_for(self.forward)
        return self.get_input_embeddings()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, VisionEmbeddings):
            init.normal_(module.class_embedding)
        elif isinstance(module, PerceiverResampler):
            init.normal_(module.latents)
        elif isinstance(module, GatedCrossAttentionLayer):
            for alpha in (module.alpha_cross_attn, module.alpha_dense):
                self._init_alpha(alpha)

    def _init_alpha(self, alpha: nn.Parameter):
        if self.config.alpha_initializer == "zeros":
            init.zeros_(alpha)
        elif self.config.alpha_initializer == "ones":
            init.ones_(alpha)
        else:
            init.normal_(alpha, mean=0.0, std=self.config.alphas_initializer_range)
