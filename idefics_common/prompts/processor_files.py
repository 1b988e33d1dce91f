"""What a saved processor needs beyond transformers 5's own files, so that the directory means the same everywhere.

transformers 5 writes one ``processor_config.json`` with the image processor inside, names tokenizer classes that
version 4 does not have, and lists additional special tokens under a key that version 4 takes for a dictionary. It
still understands the older form of all three, so the older form is what the files get. And it leaves out the flag
`legacy` of a LLaMA tokenizer, without which the reloaded tokenizer splits the text after a special token differently
from the one that was saved.
"""

import json
from pathlib import Path

# transformers 5 -> the name under which both versions know the class
_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "LlamaTokenizer": "LlamaTokenizerFast"}


def complete_saved_files(processor, directory) -> None:
    """Complete a directory that `ProcessorMixin.save_pretrained` of transformers 5 has written.

    Args:
        processor: the processor saved there.
        directory: its path.
    """
    directory = Path(directory)
    image_processor = processor.image_processor.to_dict() | {"processor_class": type(processor).__name__}
    _write(directory / "preprocessor_config.json", image_processor)

    path = directory / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    name = tokenizer["tokenizer_class"]
    tokenizer["tokenizer_class"] = _TOKENIZER_CLASSES.get(name, name)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    if hasattr(processor.tokenizer, "legacy"):
        tokenizer["legacy"] = processor.tokenizer.legacy
    _write(path, tokenizer)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
