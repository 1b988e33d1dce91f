"""The configuration matrix of the tests covers what it claims to."""

import itertools

from idefics_common.configuration.fields import fields_from_dict
from tests.models import MATRIX, small_config

CHOICES = {
    "resampler": ("none", "plain", "with norms"),
    "qk_layer_norms": (False, True),
    "alpha_type": ("float", "vector"),
    "cross_layer_interval": (1, 2, 4),
    "additional_vocab_size": (0, 3),
    "tie_word_embeddings": (False, True),
}


def choices_of(variant: str) -> dict:
    config = fields_from_dict(small_config(**MATRIX[variant]))
    chosen = {name: getattr(config, name) for name in CHOICES if name != "resampler"}
    norms = config.perceiver_config.qk_layer_norms_perceiver
    chosen["resampler"] = ("with norms" if norms else "plain") if config.use_resampler else "none"
    return chosen


def test_every_two_choices_meet_in_a_row_of_the_matrix():
    met = {pair for variant in MATRIX for pair in itertools.combinations(sorted(choices_of(variant).items()), 2)}
    for first, second in itertools.combinations(sorted(CHOICES), 2):
        for values in itertools.product(CHOICES[first], CHOICES[second]):
            assert ((first, values[0]), (second, values[1])) in met, f"{first}, {second} = {values} is in no row"
