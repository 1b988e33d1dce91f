"""Fixtures of the Keras tests."""

import tests.tf.settings  # noqa: F401 - before TensorFlow runs anything
