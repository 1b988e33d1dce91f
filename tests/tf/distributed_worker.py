"""One process of a distributed training run; `test_distributed.py` starts it.

    python -m tests.tf.distributed_worker mirrored|workers FOLDER

Writes what `CASES` report and the weights they end with to a file each in FOLDER.
"""

import json
import os
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything
from tests.models import SMALL, batch, labels_of
from tests.tf.random_models import canonical, tf_model

SHALLOW = {
    "num_hidden_layers": 1,
    "cross_layer_interval": 1,
    "vision_config": {**SMALL["vision_config"], "num_hidden_layers": 1},
    "perceiver_config": {**SMALL["perceiver_config"], "resampler_depth": 1},
}
EPOCHS = 2


def make_batch(config):
    """Five rows: four, whose first two have 10 labels and the others 2 and no images, and one more.

    In batches of four, one replica gets two rows with most of the labels, and then the only row.
    """
    inputs = {name: value[[0, 3, 1, 1, 0]] for name, value in batch(config).items()}
    labels = labels_of(inputs)
    labels[2:4, 3:] = -100
    inputs["input_ids"][3] = inputs["input_ids"][3, ::-1]
    labels[3, 1:] = -100
    return {**inputs, "labels": labels}


def built_in_loss(model, inputs):
    model.gradient_checkpointing_enable()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    return inputs


def keras_loss_accumulated(model, inputs):
    # the two batches of an epoch make one update, whose gradient is clipped
    optimizer = keras.optimizers.AdamW(1e-2, weight_decay=0.1, global_clipnorm=0.1, gradient_accumulation_steps=2)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-100))
    return inputs, inputs.pop("labels"), np.array([[1.0], [2.0], [0.5], [3.0], [1.5]], "float32")


CASES = {function.__name__: function for function in (built_in_loss, keras_loss_accumulated)}


def strategy_of(kind):
    if kind == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    if kind == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def train(strategy, case):
    """Train and validate on the same batches; the number of replicas, the losses of each epoch, and the weights."""
    with strategy.scope():
        model = tf_model(**SHALLOW)
        data = CASES[case](model, make_batch(model.config))
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = tf.data.Dataset.from_tensor_slices(data).batch(4).with_options(options)
    history = model.fit(dataset, epochs=EPOCHS, verbose=0, shuffle=False, validation_data=dataset).history
    losses = {name: history[name] for name in ("loss", "val_loss")}
    return {"replicas": strategy.num_replicas_in_sync, **losses, **canonical(model)}


def main(kind, folder):
    strategy = strategy_of(kind)
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)
    for case in CASES:
        np.savez(Path(folder) / f"{kind}-{task}-{case}.npz", **train(strategy, case))


if __name__ == "__main__":
    main(*sys.argv[1:])
