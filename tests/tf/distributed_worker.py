"""One process of a distributed training run; `test_distributed.py` starts it.

    python -m tests.tf.distributed_worker mirrored|workers FOLDER

Writes the losses and the weights after two steps to a file in FOLDER.
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
STEPS = 2


def make_batch(config):
    """Four rows, two for each replica; the first two have 10 labels, the others 2, and no images."""
    inputs = {name: value[[0, 3, 1, 1]] for name, value in batch(config).items()}
    labels = labels_of(inputs)
    labels[2:, 3:] = -100
    inputs["input_ids"][3] = inputs["input_ids"][3, ::-1]
    labels[3, 1:] = -100
    return {**inputs, "labels": labels}


def strategy_of(kind):
    if kind == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
        return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    if kind == "workers":
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def train(kind):
    """Train on the same batch twice; the number of replicas, the losses, and the weights."""
    strategy = strategy_of(kind)
    with strategy.scope():
        model = tf_model(**SHALLOW)
        model.gradient_checkpointing_enable()
        model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9))
    dataset = tf.data.Dataset.from_tensor_slices(make_batch(model.config)).batch(4)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    dataset = dataset.with_options(options)
    history = model.fit(dataset, epochs=STEPS, verbose=0, shuffle=False).history
    return strategy.num_replicas_in_sync, history["loss"], canonical(model)


def main(kind, folder):
    replicas, losses, weights = train(kind)
    task = json.loads(os.environ.get("TF_CONFIG", "{}")).get("task", {}).get("index", 0)
    np.savez(Path(folder) / f"{kind}-{task}.npz", replicas=replicas, losses=losses, **weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
