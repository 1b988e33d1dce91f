"""`TFIdeficsPreTrainedModel`: what the models share: construction, loading and saving in every format.

Unusual: all variables exist after construction. Loading is strict: a checkpoint that lacks a tensor, has one that the
model does not, or has one of another shape is an error that names it. The home format is PyTorch's: what is saved here,
`idefics_pt` and transformers load, and the other way round, without torch being installed.

Mirrors `idefics_pt/pretrained.py`.
"""

import contextlib
import os
from dataclasses import fields
from pathlib import Path

import keras
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from idefics_common.checkpoint import Checkpoint, keras_file, open_checkpoint
from idefics_common.checkpoint.checkpoint import DIRECTORY_FILES
from idefics_common.checkpoint.files import find_file
from idefics_common.checkpoint.hub import CANONICAL_WEIGHTS, download
from idefics_common.checkpoint.model_tensors import match_tensors
from idefics_common.checkpoint.quantization import declared_quantization, refuse_quantized
from idefics_common.configuration.config import IdeficsConfig
from idefics_common.configuration.fields import IdeficsFields, check_fields, read_config
from idefics_tf.export import ExportMixin
from idefics_tf.freezing import freeze_as_configured, set_trainability, trainability, weights_by_path
from idefics_tf.generation import Graphs
from idefics_tf.gradient_checkpointing import CheckpointedLayer
from idefics_tf.host_memory import provided
from idefics_tf.initialization import values_follow
from idefics_tf.inputs import as_tensors, is_symbolic, named_inputs, symbolic_options
from idefics_tf.layers import Composite, adapted_sublayers, named_sublayers, sublayers
from idefics_tf.quantization import quantize_linear_layers, quantized_layers, quick_deletion
from idefics_tf.resizing import resize_vocabulary
from idefics_tf.saving import save_model
from idefics_tf.weights import bytes_of_variables, dtype_of, read_weights

_OVERRIDES = {field.name for field in fields(IdeficsFields)} | {
    "image_token_id", "output_attentions", "output_hidden_states"
}  # fmt: skip


class TFIdeficsPreTrainedModel(ExportMixin, Composite, keras.Model):
    """Base of the IDEFICS models in Keras.

    Args:
        config: an `IdeficsConfig`.
        dtype: a dtype or a Keras dtype policy such as "mixed_bfloat16"; by default the global policy.
        name: name of the model.
    """

    has_head = False

    def __init__(self, config: IdeficsConfig, dtype=None, name=None, **kwargs):
        check_fields(config)
        super().__init__(dtype=dtype, name=name, autocast=False, **kwargs)
        if isinstance(self.dtype_policy, keras.dtype_policies.QuantizedDTypePolicy):
            raise ValueError(
                f"dtype {self.dtype_policy.name!r} is for integers: make or load the model in floating point, and call "
                "quantize."
            )
        self.config = config
        self.jit_compile = False
        self._traced = Graphs()
        self.modules_to_save = ()  # what trains, or has trained, beside adapters; see `idefics_tf.lora`

    @contextlib.contextmanager
    def _own_dtype_and_name(self):
        """Within, new layers have this model's dtype policy, and variables of models inside carry its name."""
        before = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype_policy)
        try:
            with keras.name_scope(self.name):
                yield
        finally:
            keras.config.set_dtype_policy(before)

    def __call__(self, *args, **kwargs):
        """See `call`; inputs may come by name, in the order of `call`, or as one dict or list, as Keras passes them."""
        inputs = named_inputs(self.call, args, kwargs)
        inputs = as_tensors(inputs, self.config, inputs.get("interpolate_pos_encoding"))
        return super().__call__(**(symbolic_options(inputs) if is_symbolic(inputs) else inputs))

    def compile(self, *args, jit_compile=False, **kwargs):
        """See `keras.Model.compile`. XLA is off by default: it compiles anew for each length of text."""
        super().compile(*args, jit_compile=jit_compile, **kwargs)

    def make_train_function(self, force=False):
        """See `keras.Model.make_train_function`. Traced anew if variables, or which of them train, have changed."""
        trains = tuple(variable.trainable for variable in self.weights)
        super().make_train_function(force or self._is_new("train", trains))

    def make_test_function(self, force=False):
        """See `keras.Model.make_test_function`. Traced anew if variables have come or gone, by LoRA for example."""
        super().make_test_function(force or self._is_new("test"))

    def make_predict_function(self, force=False):
        """See `keras.Model.make_predict_function`, and `make_test_function`."""
        return super().make_predict_function(force or self._is_new("predict"))

    def _is_new(self, loop: str, state=()) -> bool:
        """Whether a loop was not traced last for the variables that there are now, in this state."""
        traced = self._traced.on([variable.value for variable in self.weights])
        is_new = traced.get(loop) != state
        traced[loop] = state
        return is_new

    def predict_step(self, data):
        # a cache cannot be joined over batches, and nobody who predicts wants one
        inputs, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self(inputs, use_cache=False, training=False)

    def save(self, filepath, overwrite=True, zipped=None):
        """See `keras.Model.save`; a ``.keras`` file, or with ``zipped=False`` a directory.

        Raises:
            ValueError: for a legacy HDF5 file, which keeps weights by their order among those that train, and no names.
        """
        if os.fspath(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"save writes no legacy HDF5 file, got filepath {os.fspath(filepath)!r}: give it the ending .keras, or "
                "call save_weights with .weights.h5, or save_pretrained."
            )
        super().save(filepath, overwrite=overwrite, zipped=zipped)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """See `keras.Model.load_weights`. Raises `ValueError` for a legacy HDF5 file, see `save`."""
        path = os.fspath(filepath)
        if path.endswith((".h5", ".hdf5")) and not path.endswith(".weights.h5"):
            raise ValueError(f"load_weights reads no legacy HDF5 file, got filepath {path!r}: expected .weights.h5.")
        super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)

    def get_compile_config(self):
        """See `keras.Model.get_compile_config`; says besides which variables the optimizer has states for."""
        config = super().get_compile_config()
        if config:
            paths = {id(weight): path for path, weight in weights_by_path(self).items()}
            known = self.optimizer._trainable_variables if self.optimizer and self.optimizer.built else ()
            config["optimized"] = [paths[id(variable)] for variable in known if id(variable) in paths]
        return config

    def compile_from_config(self, config):
        """Compile as `get_compile_config` says. Keras calls this when it loads a model."""
        config = dict(config)
        optimized = config.pop("optimized", None)
        self.compile(**keras.saving.deserialize_keras_object(config))
        weights = weights_by_path(self)
        variables = self.trainable_variables if optimized is None else [weights[path] for path in optimized]
        if variables and self.optimizer:
            self.optimizer.build(variables)

    def get_config(self):
        return {
            "config": self.config.to_dict(),
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "name": self.name,
            "quantized_layers": {
                path: keras.saving.serialize_keras_object(layer.quantization_config)
                for path, layer in quantized_layers(self).items()
            },
            "adapters": {
                path: {"rank": layer.lora_rank, "lora_alpha": layer.lora_alpha}
                for path, layer in adapted_sublayers(self).items()
            },
            "modules_to_save": list(self.modules_to_save),
            "trainability": trainability(self),
            "gradient_checkpointing": self.is_gradient_checkpointing,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = cls(IdeficsConfig.from_dict(config["config"]), dtype=config["dtype"], name=config["name"])
        layers = dict(named_sublayers(model))
        quantized = config["quantized_layers"]
        if isinstance(quantized, list):  # files of earlier versions have one configuration for all
            quantized = dict.fromkeys(quantized, config["quantization"])
        with quick_deletion():
            for path, quantization in quantized.items():
                layers[path].quantize(config=keras.saving.deserialize_keras_object(quantization, custom_objects))
        for path, adapters in config.get("adapters", {}).items():
            layers[path].enable_lora(**adapters)
        model.modules_to_save = tuple(config.get("modules_to_save", ()))
        if "trainability" in config:  # files of earlier versions do not say
            set_trainability(model, config["trainability"])
        if config.get("gradient_checkpointing"):
            model.gradient_checkpointing_enable()
        return model

    def get_build_config(self):
        """Nothing: the configuration says it all."""

    def build_from_config(self, config):
        """Nothing to do: the constructor has built the model."""

    def apply_freezing(self):
        """Freeze parameters as the configuration asks; done by the constructor."""
        freeze_as_configured(self)

    def resize_token_embeddings(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True):
        """Change the size of the vocabulary; ids keep their meaning and trained rows are kept. Call `compile` after it.

        Args:
            new_num_tokens: size of the whole vocabulary. With an additional vocabulary, that one takes the change and
                becomes ``new_num_tokens - vocab_size``; without, the base matrix does.
            pad_to_multiple_of: round the whole up to a multiple of this.
            mean_resizing: start new rows at the mean of the base rows instead of at random.

        Returns:
            the embedding layer.

        Raises:
            ValueError: if there is an additional vocabulary and `new_num_tokens` is below `vocab_size`, or the model is
                quantized, or the vocabulary has LoRA adapters.
        """
        if self.is_quantized:
            raise ValueError("The vocabulary of a quantized model has its size: resize it before quantizing.")
        model = self.model if self.has_head else self
        head = self.lm_head if self.has_head else None
        if adapted_sublayers(model.embed_tokens) or (head and adapted_sublayers(head)):
            raise ValueError("The vocabulary has LoRA adapters of its size: call idefics_tf.lora.merge_adapters first.")
        resize_vocabulary(model.embed_tokens, head, self.config, new_num_tokens, pad_to_multiple_of, mean_resizing)
        return model.embed_tokens

    def quantize(self, mode=None, config=None, filters=None, type_check=True):
        """Hold the kernels of decoder layers, gated blocks and head in 8 or 4 bits; see `keras.Model.quantize`.

        The vision tower, the resampler, embeddings, the head of the additional vocabulary, norms and gates stay as they
        are. What it costs is measured in docs/keras.md. For inference: integer kernels train no more. A quantized
        model can generate, be evaluated and exported, and be kept by `save` and `save_weights`; the home format has no
        place for it.

        Args:
            mode: "int8", which makes inputs of linear layers int8 too, with a scale for each token; "int4", kernels
                alone, in groups of 128 inputs; or "float8", which rounds kernels and inputs while it computes, holds
                them as they were, and goes on training.
            config: instead of the mode, one of Keras's configurations, such as a
                `keras.quantizers.Int8QuantizationConfig`: with ``activation_quantizer=None`` inputs stay as they are.
            filters: a regular expression for names of layers, a list of them, or a callable that gets a layer; of the
                layers above, only those that it lets pass are quantized.
            type_check: whether layers of a subclass of `keras.layers.Dense` are refused.

        Raises:
            ValueError: for another mode, filters that no layer passes, or if the model is quantized already, has LoRA
                adapters, or computes in float16, where the products of scales overflow.
        """
        quantize_linear_layers(self, mode, config, filters, type_check)

    @property
    def is_quantized(self) -> bool:
        """Whether a layer is quantized, by `quantize` or by its own."""
        return bool(quantized_layers(self))

    def gradient_checkpointing_enable(self):
        """Recompute decoder layers, gated blocks and vision layers in the backward pass: less memory, more time."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self):
        """Undo `gradient_checkpointing_enable`."""
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any layer recomputes its activations in training."""
        return any(layer.gradient_checkpointing for layer in self._checkpointed_layers())

    def _checkpointed_layers(self):
        return [layer for layer in sublayers(self) if isinstance(layer, CheckpointedLayer)]

    def _set_gradient_checkpointing(self, enabled):
        for layer in self._checkpointed_layers():
            layer.gradient_checkpointing = enabled
        self.train_function = None  # it is traced anew

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *,
        config=None,
        dtype=None,
        revision=None,
        token=None,
        cache_dir=None,
        subfolder="",
        local_files_only=False,
        force_download=False,
        name=None,
        **config_overrides,
    ):
        """Load a model from a directory or from the Hugging Face hub.

        Reads what PyTorch users publish: safetensors, in shards or not, without torch; ``pytorch_model.bin`` where
        torch is installed; and what ``convert-weights --to keras`` writes, ``model.weights.h5``. Tensors are read a few
        at a time into the memory of their variables, and no initial values are computed.

        Args:
            pretrained_model_name_or_path: a directory, or the id of a repository on the hub.
            config: an `IdeficsConfig` to use instead of the directory's.
            dtype: a dtype or a Keras dtype policy; "auto" for the dtype of the checkpoint. By default the global policy
                if one was set that is not float32, else "auto".
            revision, token, cache_dir, local_files_only, force_download: see `huggingface_hub.snapshot_download`.
            subfolder: where in the directory or repository the files are.
            name: name of the model.
            config_overrides: fields of `IdeficsFields` to change, `output_attentions`, `output_hidden_states`, or
                `image_token_id`.

        Raises:
            TypeError: for any other keyword, or a `config` of another type.
            CheckpointError: a ValueError: there is no such directory or repository, files are damaged or incomplete,
                or tensors are missing, unexpected or of another shape; the message names files and tensors.
            FileNotFoundError: if the directory has no config.json.
        """
        directory = Path(os.fspath(pretrained_model_name_or_path))
        if not directory.is_dir():
            options = {
                "revision": revision,
                "token": token,
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
                "force_download": force_download,
            }
            beside = ("config.json", GENERATION_CONFIG_NAME)
            weights = (*CANONICAL_WEIGHTS, keras_file.HUB_PATTERNS)
            directory = download(str(directory), beside, weights, subfolder, **options)
        else:
            directory = directory / subfolder
        if config is not None and not isinstance(config, IdeficsConfig):
            raise TypeError(f"config must be an IdeficsConfig, got a {type(config).__name__}: {config!r}.")
        for field in config_overrides:
            if field not in _OVERRIDES:
                instead = ": give `dtype`, which also takes Keras's policies" if field == "torch_dtype" else ""
                raise TypeError(f"from_pretrained got an unexpected keyword argument {field!r}{instead}.")
        if config is None:
            read_config(directory)  # refuses what is no configuration of IDEFICS, in the words of the converter
            config = IdeficsConfig.from_pretrained(directory)
        if config_overrides:
            config = IdeficsConfig.from_dict({**config.to_dict(), **config_overrides})
            check_fields(config)  # before tensors are compared with them
        with _open_weights(directory) as checkpoint:
            refuse_quantized(checkpoint.path, checkpoint.infos, declared_quantization(directory))
            naming = {}
            if checkpoint.format == keras_file.FORMAT:
                naming = {"name_of": keras_file.stored_name, "shape_of": keras_file.stored_shape}
            tensors = match_tensors(checkpoint.path, checkpoint.infos, config, cls.has_head, **naming)
            names = {name: parameter.name for parameter, name in tensors.names.items() if parameter.tied_to is None}
            if dtype == "auto" or (dtype is None and keras.config.dtype_policy().name == "float32"):
                dtype = dtype_of(checkpoint)
            with values_follow(), provided(bytes_of_variables(checkpoint, names, dtype)) as memory:
                model = cls(config, dtype=dtype, name=name)
            read_weights(model, checkpoint, names, memory)
        if cls.has_head and (directory / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory)
        return model

    def save_pretrained(self, save_directory, max_shard_size="5GB"):
        """Write config.json, generation_config.json and the weights, as `idefics_pt` and transformers load them too.

        Args:
            save_directory: made if need be. One that exists keeps its other files.
            max_shard_size: bytes, or a string such as "5GB": weights larger than this go in several files and an index.
        """
        save_model(self, save_directory, max_shard_size)


def _open_weights(directory: Path) -> Checkpoint:
    """Open the tensors of a directory, the home format before Keras's own. Raises CheckpointError."""
    path = find_file(directory, (*DIRECTORY_FILES, *keras_file.DIRECTORY_FILES))
    return (keras_file.open_keras_weights if path.name in keras_file.DIRECTORY_FILES else open_checkpoint)(path)
