"""Train the byte-level BPE of `tiny` and make every listed word one token."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<s>", "</s>", "<pad>")


def train_tokenizer(texts: list[str], forced: list[str], size: int, n_ctx: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of exactly `size` pieces; each of `forced` (with its leading space) is one of them."""
    spare = 0
    while True:  # the words that plain training misses take places at the end
        core = _train(texts, size - spare)
        data = json.loads(core.to_str())
        _force(data["model"], core, forced)
        excess = len(data["model"]["vocab"]) - size
        if excess <= 0:
            break
        spare += excess
    core = Tokenizer.from_str(json.dumps(data))
    missing = [word for word in forced if len(core.encode(word).ids) != 1]
    assert not missing, missing
    core.post_processor = _bos(core)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _train(texts: list[str], size: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        (text[i : i + 4000] for text in texts for i in range(0, len(text), 4000)),
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return core


def _force(model: dict, core: Tokenizer, forced: list[str]) -> None:
    """Add merges, of lowest rank, that join each missing word from its present pieces."""
    vocab, merges = model["vocab"], model["merges"]
    known = {tuple(pair) for pair in merges}
    for word in forced:
        pieces = core.encode(word).tokens
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in known:
                known.add(pair)
                merges.append(list(pair))
            vocab.setdefault("".join(pair), len(vocab))
            pieces = ["".join(pair), *pieces[2:]]


def _bos(core: Tokenizer):
    from tokenizers.processors import TemplateProcessing

    bos = ("<s>", core.token_to_id("<s>"))
    return TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer's files into the model's folder."""
    tokenizer.save_pretrained(folder)
