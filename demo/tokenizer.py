"""The base's tokenizer: byte-level BPE learnt from the corpus, whose words become single tokens."""

from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.corpus import documents

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 1536
TRAINING_DOCUMENTS = 20_000
MAX_LENGTH = 512


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn the tokenizer. Its only special token ends a text; it adds none to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = islice(documents(seed), TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator((document.prompt + document.output for document in sample), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
