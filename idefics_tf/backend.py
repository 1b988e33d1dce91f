"""Refuses Keras on another backend than TensorFlow, when it is imported.

Keras alone has this file.
"""

import keras

if keras.backend.backend() != "tensorflow":
    raise ImportError(
        f"idefics_tf needs Keras on the TensorFlow backend, but Keras runs on {keras.backend.backend()!r}: set the "
        "environment variable KERAS_BACKEND=tensorflow before Keras is imported."
    )
