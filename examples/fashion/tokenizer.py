"""A LLaMA-style fast tokenizer for the vocabulary of `prompts.py`, trained in a second.

Same build as the published checkpoints' tokenizer: byte-pair encoding over whole segments, a `▁` put before every
segment and in place of every space, bytes `<0x00>`..`<0xFF>` for whatever else comes, `<unk>`, `<s>`, `</s>` at 0,
1, 2, left padding with `<unk>`. The three tokens of IDEFICS follow the base vocabulary: they are the model's
`additional_vocab_size`.
"""

from prompts import NAMING, ORDINAL, ORDINALS, RECALL, SAME, THINGS, WHICH, YES_NO, sentence, text_questions
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

IMAGE_TOKENS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
BASE_TOKENS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
# Printable ASCII is in the alphabet, so that a newcomer's own questions are not spelled in bytes.
ALPHABET = [chr(code) for code in range(33, 127)]
MAX_VOCABULARY = 600


def training_texts() -> list[str]:
    """Every sentence that a prompt or an answer can hold."""
    texts = ["User:", "\nUser:", "\nAssistant:", "Yes.", "No."] * 3
    texts += [*NAMING, "And this?", "And what is this?", *SAME]
    texts += [sentence(label) for label in range(len(THINGS))]
    texts += [template.format(thing) for template in (*YES_NO, *WHICH) for thing in THINGS]
    texts += [template.format(word) for template in (*ORDINAL, *RECALL) for word in ORDINALS]
    texts += [f"The {word}." for word in ORDINALS]
    for turns in text_questions():
        texts += [text for turn in turns for text in (*turn.question, turn.answer)]
    return texts


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Deterministic: no randomness in byte-pair training."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Only while training: merges must not cross words or punctuation, as in SentencePiece. The trained merges
    # then cannot cross them either, so that encoding needs no splitter and the file is LLaMA's.
    # Line ends stay out of the alphabet: as in LLaMA's they are the byte <0x0A>.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "removed"), pre_tokenizers.Split(Regex(r"▁?[A-Za-z]+|▁|[^A-Za-z▁]"), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(BASE_TOKENS),
        initial_alphabet=[*ALPHABET, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return _llama_style(tokenizer)


def _llama_style(trained: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(trained.model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in IMAGE_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        additional_special_tokens=list(IMAGE_TOKENS),
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
