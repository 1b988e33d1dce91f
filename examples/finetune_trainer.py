"""Fine-tune the shipped IDEFICS with transformers' `Trainer`: LoRA adapters in the decoder and the gated blocks.

    python examples/finetune_trainer.py [--out FOLDER] [--steps 40]

Prints what trains, the loss, and how many photographs get the right answer before and after. With --out the adapters
are saved, and the model with the adapters merged into it, in the folder `merged` inside.
"""

import argparse
import sys
import tempfile
from pathlib import Path

FASHION = Path(__file__).parent / "fashion"
sys.path.insert(0, str(FASHION))

from data import load_shipped  # noqa: E402
from new_question import accuracy, report, training_prompts  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import Trainer, TrainingArguments, set_seed  # noqa: E402

from idefics_pt import IdeficsCollator, IdeficsForVisionText2Text, IdeficsProcessor  # noqa: E402
from idefics_pt.lora import lora_config  # noqa: E402
from idefics_pt.trainable import trainable_parameters  # noqa: E402


def main(arguments=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the adapters and the merged model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate")
    parser.add_argument("--activation-checkpointing", action="store_true", help="less memory, more time")
    options = parser.parse_args(arguments)
    set_seed(0)

    processor = IdeficsProcessor.from_pretrained(FASHION / "checkpoint")
    base = IdeficsForVisionText2Text.from_pretrained(FASHION / "checkpoint")
    model = get_peft_model(base, lora_config(base, ("text", "cross_attention"), r=16))
    print(trainable_parameters(model))
    test = load_shipped("test")
    before = accuracy(model, processor, test)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                learning_rate=options.rate,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                remove_unused_columns=False,  # the collator needs the column "prompt"
                activation_checkpointing=options.activation_checkpointing,
            ),
            train_dataset=training_prompts(load_shipped("train")),
            data_collator=IdeficsCollator(processor, return_tensors="pt"),
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    after = accuracy(model, processor, test)
    print(report(before, after))
    if options.out:
        model.save_pretrained(options.out)
        model.merge_and_unload().save_pretrained(options.out / "merged")
        processor.save_pretrained(options.out / "merged")
        print(f"saved to {options.out}")
    return {"losses": losses, "before": before, "after": after}


if __name__ == "__main__":
    main()
