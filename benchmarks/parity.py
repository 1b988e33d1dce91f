"""Measure how far ours is from transformers' IDEFICS, and keep the README's table of differences.

For every model of the configuration matrix of the tests, with the same random weights on both sides, in float32 on the
CPU: the largest difference of logits, of hidden states, of the loss and of its gradients, relative to their scale, over
batches with left padding, with right padding, and with larger images and interpolated positions; and whether greedy and
beam search give the same tokens.

    python -m benchmarks.parity                      print the table
    python -m benchmarks.parity --write README.md    put it between the table's markers
"""

import argparse
import json
import re
from pathlib import Path

import torch
import transformers

from tests.models import MATRIX
from tests.pt.pairs import CALLS, oracle_loss, our_model, parity_call, reference_model, torch_batch
from tests.tolerances import relative_error

BEGIN, END = "<!-- parity table: python -m benchmarks.parity --write README.md -->", "<!-- end of parity table -->"
DIFFERENCES = ("logits", "hidden states", "loss", "gradients")
GREEDY = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}


def measure(variant: str, attention: str) -> dict:
    """One model: the largest differences by name over all calls, and whether "greedy" and "beam" give the same tokens.

    Search is measured on the batch with left padding, as prompts for generation are padded.
    """
    ours, reference = (
        our_model("cpu", attention, **MATRIX[variant]),
        reference_model("cpu", attention, **MATRIX[variant]),
    )
    of_calls = [differences(ours, reference, call) for call in CALLS]
    inputs = torch_batch(ours.config)
    return {name: max(of_call[name] for of_call in of_calls) for name in DIFFERENCES} | {
        "greedy": torch.equal(ours.generate(**inputs, **GREEDY), reference.generate(**inputs, **GREEDY)),
        "beam": torch.equal(
            ours.generate(**inputs, num_beams=3, **GREEDY), reference.generate(**inputs, num_beams=3, **GREEDY)
        ),
    }


def differences(ours, reference, call: str) -> dict[str, float]:
    """Relative differences in one row of `tests.pt.pairs.CALLS`, by the names of `DIFFERENCES`."""
    ours.zero_grad()
    reference.zero_grad()
    inputs, kwargs = parity_call(call, ours.config)
    labels = inputs.pop("labels")
    actual = ours(**inputs, labels=labels, output_hidden_states=True, **kwargs)
    expected = reference(**inputs, output_hidden_states=True, **kwargs)
    expected_loss = oracle_loss(expected.logits, labels)
    actual.loss.backward()
    expected_loss.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    least_scale = 1e-3 * max(gradient.abs().max() for gradient in gradients.values())
    hidden = zip(actual.hidden_states, expected.hidden_states, strict=True)
    return {
        "logits": relative_error(actual.logits.detach(), expected.logits.detach()),
        "hidden states": max(relative_error(a.detach(), e.detach()) for a, e in hidden),
        "loss": relative_error(actual.loss.detach(), expected_loss.detach()),
        "gradients": max(
            relative_error(p.grad, gradients[name], least_scale)
            for name, p in ours.named_parameters()
            if name in gradients
        ),
    }


def table(rows: dict[tuple[str, str], dict]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"Measured against transformers {transformers.__version__} with torch {torch.__version__.partition('+')[0]}, "
        "float32, CPU, one thread; differences are relative to scale, and the largest of three batches: left padding, "
        "right padding, interpolated positions. Tokens are generated with left padding.",
        "",
        f"| model | attention | {' | '.join(DIFFERENCES)} | greedy tokens | beam tokens |",
        "|---" * (len(DIFFERENCES) + 4) + "|",
    ]
    for (variant, attention), row in rows.items():
        numbers = " | ".join(f"{row[name]:.1e}" for name in DIFFERENCES)
        tokens = " | ".join("same" if row[name] else "**differ**" for name in ("greedy", "beam"))
        lines.append(f"| {variant.replace('_', ' ')} | {attention} | {numbers} | {tokens} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="file whose table is to be replaced")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {(variant, attention): measure(variant, attention) for variant in MATRIX for attention in ("eager", "sdpa")}
    text = table(rows)
    print(text)
    if options.write:
        page = options.write.read_text(encoding="utf-8")
        if BEGIN not in page or END not in page:
            raise SystemExit(f"{options.write} has no place for the table: expected the lines {BEGIN!r} and {END!r}.")
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        page = re.sub(pattern, lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.DOTALL)
        options.write.write_text(page, encoding="utf-8")
    print(json.dumps({"worst logits": max(row["logits"] for row in rows.values())}))


if __name__ == "__main__":
    main()
