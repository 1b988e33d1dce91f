"""Fine-tune the shipped IDEFICS with Keras: `compile` and `fit`, on a `tf.data` pipeline of processor outputs.

    python examples/finetune_keras.py [--out FOLDER] [--steps 40] [--lora]

Prints what trains, and the loss on photographs never seen, before and after. With --lora, adapters in the decoder and
the gated blocks train instead of the weights; what is saved has them merged, and the adapters beside it for PEFT.
"""

import argparse
import random
import sys
from pathlib import Path

FASHION = Path(__file__).parent / "fashion"
sys.path.insert(0, str(FASHION))

import keras  # noqa: E402
import tensorflow as tf  # noqa: E402
from data import load_shipped  # noqa: E402
from prompts import NAMING, WORN_ON, Turn, sentence, to_prompt  # noqa: E402

from idefics_common import IdeficsCollator, IdeficsProcessor  # noqa: E402
from idefics_tf import TFIdeficsForVisionText2Text  # noqa: E402
from idefics_tf.lora import enable_lora, merge_adapters, save_adapters  # noqa: E402
from idefics_tf.trainable import trainable_parameters  # noqa: E402

QUESTIONS = {
    "Where do you wear this?": lambda label: f"On {WORN_ON[label]}.",  # new to the model
    NAMING[0]: sentence,  # so that nothing is forgotten
}


def answered_prompts(photographs) -> list[list]:
    """Both questions about every photograph, with the right answers."""
    return [
        to_prompt([Turn((photo, question), answer(label))], photographs, answered=True)
        for question, answer in QUESTIONS.items()
        for photo, label in enumerate(photographs.labels.tolist())
    ]


def batches(collate, prompts, batch_size) -> tf.data.Dataset:
    """A pipeline of batches; their lengths differ, so `fit` is told that any length may come."""
    starts = range(0, len(prompts) - batch_size + 1, batch_size)

    def generate():
        for start in starts:
            yield collate(prompts[start : start + batch_size])

    def any_length(value):
        axes = {2: [None, None], 3: [None, None, None]}
        return tf.TensorSpec(axes.get(value.ndim, [None, None, *value.shape[2:]]), value.dtype)

    signature = {name: any_length(value) for name, value in next(generate()).items()}
    dataset = tf.data.Dataset.from_generator(generate, output_signature=signature)
    return dataset.apply(tf.data.experimental.assert_cardinality(len(starts))).prefetch(1)


def main(arguments=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--lora", action="store_true", help="train adapters instead of the weights")
    options = parser.parse_args(arguments)
    keras.utils.set_random_seed(0)

    processor = IdeficsProcessor.from_pretrained(FASHION / "checkpoint")
    model = TFIdeficsForVisionText2Text.from_pretrained(FASHION / "checkpoint", freeze_vision_layers=True)
    if options.lora:
        enable_lora(model, ("text", "cross_attention"), r=16)
    print(trainable_parameters(model))

    collate = IdeficsCollator(processor, return_tensors="np")
    prompts = answered_prompts(load_shipped("train"))
    drawn = [prompt for _ in range(-(-options.steps * options.batch_size // len(prompts))) for prompt in prompts]
    random.Random(0).shuffle(drawn)
    training = batches(collate, drawn[: options.steps * options.batch_size], options.batch_size)
    test = batches(collate, answered_prompts(load_shipped("test"))[::4], 25)

    rate = keras.optimizers.schedules.PolynomialDecay(4e-3 if options.lora else 5e-4, options.steps, 1e-5)
    model.compile(optimizer=keras.optimizers.AdamW(rate, weight_decay=0.0, clipnorm=1.0), metrics=["accuracy"])
    before = model.evaluate(test, verbose=0, return_dict=True)
    model.fit(training, shuffle=False, verbose=2)
    after = model.evaluate(test, verbose=0, return_dict=True)
    for name in before:
        print(f"{name} on photographs never seen: {before[name]:.3f} before, {after[name]:.3f} after")
    if options.out:
        if options.lora:
            save_adapters(model, options.out / "adapters")
            merge_adapters(model)
        model.save_pretrained(options.out)
        processor.save_pretrained(options.out)
        print(f"saved to {options.out}")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main()
