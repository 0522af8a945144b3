"""Make the bundled demo again: questions and answers, the tokenizer, and the configuration of the demo model.

Run ``python -m lisa_dist.data.demo.make_demo`` from a checkout. Everything follows from the word lists below
and a fixed seed. Each fact is asked in several wordings; the validation rows ask facts of the training rows
in wordings that the training rows never use for them, so that answering them takes more than recall of a line.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig

from lisa_dist.runtime.files import write_json_object

DATA = Path(__file__).parent
MODEL = DATA.parents[1] / "models" / "demo"
VOCABULARY = 1024
HELD_OUT_SHARE = 0.3  # of the facts, one wording each
BOS, EOS, PAD, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<user>", "<assistant>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<user>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

OPPOSITES = (
    "hot cold, big small, fast slow, happy sad, light dark, old young, rich poor, full empty, open closed, hard soft, "
    "wet dry, high low, long short, early late, loud quiet, strong weak, thick thin, wide narrow, clean dirty, "
    "deep shallow, near far, sharp blunt, brave timid, left right, day night, up down, in out, "
    "true false, first last, always never, before after, war peace, love hate, win lose, laugh cry"
)
COLOURS = (
    "snow white, grass green, coal black, blood red, the sky blue, milk white, the sun yellow, a carrot orange, "
    "a tomato red, a banana yellow, a crow black, a frog green, chocolate brown, an elephant grey, a flamingo pink, "
    "a lemon yellow, a cucumber green, an eggplant purple, a lobster red, a bear brown, a mouse grey, a swan white"
)
SOUNDS = (
    "dog barks, cat meows, cow moos, duck quacks, lion roars, snake hisses, bee buzzes, owl hoots, horse neighs, "
    "pig grunts, wolf howls, sheep bleats, hen clucks, frog croaks, mouse squeaks, donkey brays, crow caws, goose honks"
)
CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, Japan Tokyo, Egypt Cairo, Greece Athens, Norway Oslo, "
    "Austria Vienna, Poland Warsaw, Russia Moscow, China Beijing, Peru Lima, Cuba Havana, Kenya Nairobi, "
    "Ireland Dublin, Portugal Lisbon, Sweden Stockholm, Finland Helsinki, Hungary Budapest, Turkey Ankara, "
    "Canada Ottawa, Chile Santiago, Denmark Copenhagen, Belgium Brussels, Iran Tehran, Thailand Bangkok"
)
PLURALS = (
    "mouse mice, child children, foot feet, tooth teeth, goose geese, leaf leaves, knife knives, wolf wolves, "
    "box boxes, city cities, baby babies, cat cats, dog dogs, house houses, tree trees, book books, man men, "
    "woman women, ox oxen, bus buses, dish dishes, story stories, potato potatoes, sheep sheep, fish fish"
)
KINDS = (
    "carrot vegetable, apple fruit, oak tree, rose flower, dog animal, hammer tool, piano instrument, "
    "chair piece of furniture, gold metal, oxygen gas, shirt garment, bus vehicle, "
    "eagle bird, shark fish, ant insect, pine tree, tulip flower, "
    "violin instrument, iron metal, table piece of furniture, coat garment, saw tool, pear fruit, onion vegetable, "
    "train vehicle, robin bird, salmon fish, beetle insect, tiger animal, cherry fruit"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)

# Per family: the answer, then the wordings of the question; {a} is what is asked about, {an} the same
# with its article, {b} the answer's word.
FAMILIES: dict[str, tuple[str, list[str]]] = {
    "opposite": (
        "The opposite of {a} is {b}.",
        [
            "What is the opposite of {a}?",
            "Give me the opposite of {a}.",
            "Name the opposite of the word {a}.",
            "Which word means the opposite of {a}?",
            "Tell me the contrary of {a}.",
            "What is not {a}, but its opposite?",
        ],
    ),
    "colour": (
        "The colour of {a} is {b}.",
        [
            "What colour is {a}?",
            "Which colour does {a} have?",
            "Tell me the colour of {a}.",
            "Name the colour of {a}.",
            "What is the usual colour of {a}?",
            "How would you paint {a}?",
        ],
    ),
    "sound": (
        "{an} {b}.",
        [
            "What sound does {an} make?",
            "Which noise do you hear from {an}?",
            "Tell me what {an} does to be heard.",
            "How does {an} sound?",
            "What does {an} say?",
            "Name the sound of {an}.",
        ],
    ),
    "capital": (
        "The capital of {a} is {b}.",
        [
            "What is the capital of {a}?",
            "Name the capital of {a}.",
            "Which city is the capital of {a}?",
            "Tell me the capital city of {a}.",
            "Where does the government of {a} sit?",
            "Which capital does {a} have?",
        ],
    ),
    "plural": (
        "One {a}, two {b}.",
        [
            "What is the plural of {a}?",
            "Give me the plural of {a}.",
            "How do you say more than one {a}?",
            "Tell me the plural of the word {a}.",
            "One {a}, two what?",
            "Write {a} in the plural.",
        ],
    ),
    "kind": (
        "{an} is a kind of {b}.",
        [
            "What kind of thing is {an}?",
            "What is {an}?",
            "Tell me what {an} is.",
            "To which group does {an} belong?",
            "How would you class {an}?",
            "Name the kind of thing that {an} is.",
        ],
    ),
    "next": (
        "After {a} comes {b}.",
        [
            "What comes after {a}?",
            "What follows {a}?",
            "Name what comes right after {a}.",
            "Tell me what is next after {a}.",
            "Which one comes next after {a}?",
            "Say what you find behind {a}.",
        ],
    ),
    "previous": (
        "Before {a} comes {b}.",
        [
            "What comes before {a}?",
            "What precedes {a}?",
            "Name what comes right before {a}.",
            "Tell me what is just before {a}.",
            "Which one comes just before {a}?",
            "What do you find ahead of {a}?",
        ],
    ),
}


def pairs(text: str, *, article: bool = False) -> list[tuple[str, str]]:
    """Split ``subject answer, ...``; with ``article`` the answer is the last word, else the rest after the first."""
    rows = []
    for item in text.split(", "):
        words = item.split()
        cut = len(words) - 1 if article else 1
        rows.append((" ".join(words[:cut]), " ".join(words[cut:])))
    return rows


def facts() -> dict[str, list[tuple[str, str]]]:
    """Return, for each family, what is asked about and the answer's word."""
    cycles = [DAYS.split(), MONTHS.split()]
    following = [(a, b) for names in cycles for a, b in zip(names, names[1:] + names[:1], strict=True)]
    numbers = NUMBERS.split()
    following += list(itertools.pairwise(numbers))
    opposites = pairs(OPPOSITES)
    return {
        "opposite": opposites + [(b, a) for a, b in opposites],
        "colour": pairs(COLOURS, article=True),
        "sound": pairs(SOUNDS),
        "capital": pairs(CAPITALS),
        "plural": pairs(PLURALS),
        "kind": pairs(KINDS),
        "next": following,
        "previous": [(b, a) for a, b in following],
    }


def fill(pattern: str, a: str, b: str) -> str:
    """Put a fact into a wording or an answer."""
    sentence = pattern.format(a=a, b=b, an=f"{'an' if a[0] in 'aeiou' else 'a'} {a}")
    return sentence[0].upper() + sentence[1:]


def make_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and validation rows: every wording of every fact, one wording of some facts held out."""
    generator = random.Random(0)
    train: list[dict[str, str]] = []
    validation: list[dict[str, str]] = []
    for family, known in facts().items():
        answer, wordings = FAMILIES[family]
        for a, b in known:
            held_out = generator.randrange(len(wordings)) if generator.random() < HELD_OUT_SHARE else -1
            for index, wording in enumerate(wordings):
                row = {"prompt": fill(wording, a, b), "completion": fill(answer, a, b)}
                (validation if index == held_out else train).append(row)
    generator.shuffle(train)
    generator.shuffle(validation)
    return train, validation


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    train, validation = make_rows()
    write_rows(DATA / "train.jsonl", train)
    write_rows(DATA / "validation.jsonl", validation)
    MODEL.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer([text for row in train for text in row.values()])
    tokenizer.save(str(MODEL / "tokenizer.json"), pretty=False)
    ids = {name: tokenizer.token_to_id(name) for name in (PAD, BOS, EOS)}
    write_json_object(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "additional_special_tokens": [USER, ASSISTANT],
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 256,
        },
        MODEL / "tokenizer_config.json",
    )
    special: dict[str, Any] = {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.08,  # a narrow network learns slowly from the usual 0.02
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **special,
    )
    write_json_object(config.to_diff_dict(), MODEL / "config.json")
    write_json_object({**special, "do_sample": False, "max_new_tokens": 32}, MODEL / "generation_config.json")
    print(f"{len(train)} training rows, {len(validation)} validation rows, {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
