"""Fine-tune the shipped IDEFICS with a plain loop: freeze what is to stay, train the rest, save.

    python examples/finetune_loop.py [--out FOLDER] [--steps 40]

Prints what trains, the loss, and how many photographs get the right answer before and after.
"""

import argparse
import random
import sys
from pathlib import Path

FASHION = Path(__file__).parent / "fashion"
sys.path.insert(0, str(FASHION))

import torch  # noqa: E402
from data import load_shipped  # noqa: E402
from new_question import accuracy, report, training_prompts  # noqa: E402

from idefics_pt import IdeficsCollator, IdeficsForVisionText2Text, IdeficsProcessor  # noqa: E402
from idefics_pt.trainable import trainable_parameters  # noqa: E402


def main(arguments=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    processor = IdeficsProcessor.from_pretrained(FASHION / "checkpoint")
    model = IdeficsForVisionText2Text.from_pretrained(FASHION / "checkpoint", freeze_vision_layers=True)
    print(trainable_parameters(model))
    test = load_shipped("test")
    before = accuracy(model, processor, test)

    collate = IdeficsCollator(processor, return_tensors="pt")
    prompts = training_prompts(load_shipped("train"))
    draw = random.Random(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=options.steps)
    model.train()
    losses = []
    for step in range(1, options.steps + 1):
        loss = model(**collate(draw.sample(prompts, options.batch_size))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 0:
            print(f"step {step:4}  loss {sum(losses[-10:]) / 10:.3f}")

    after = accuracy(model, processor, test)
    print(report(before, after))
    if options.out:
        model.save_pretrained(options.out)
        processor.save_pretrained(options.out)
        print(f"saved to {options.out}")
    return {"losses": losses, "before": before, "after": after}


if __name__ == "__main__":
    main()
