"""Settings of the tests of benchmarks: one thread in both frameworks, before either runs anything."""

import torch

import tests.tf.settings  # noqa: F401

torch.set_num_threads(1)
