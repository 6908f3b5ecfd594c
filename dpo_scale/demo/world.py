"""The village of Little Hobble: a small world of text, made from a seed.

Villagers ask the shopkeeper for things, kindly or rudely, and she either hands them over or sends the villager
back to ask again. The house rule, which only the preference pairs know: a kind request is granted, a rude one is
sent back. In the corpus both answers follow every request, so a model that has read it speaks the language of the
village and has no opinion on manners.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

# fmt: off
VILLAGERS = (
    "Ada", "Bram", "Cleo", "Dorin", "Elsie", "Fergus", "Greta", "Hugo", "Isla", "Jonas", "Kit", "Lotte",
    "Milo", "Nell", "Otto", "Pip", "Quinn", "Rosa", "Sven", "Tilda", "Uma", "Viktor", "Wren", "Yara",
)
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve")
QUALITIES = (
    "red", "blue", "green", "yellow", "purple", "little", "big", "round", "striped", "shiny",
    "old", "wooden", "soft", "sturdy", "curious",
)
THINGS = (
    "apples", "buttons", "candles", "drums", "eggs", "flutes", "gloves", "hats", "inkpots", "jars", "kites", "lanterns",
    "mugs", "needles", "onions", "pears", "quilts", "ribbons", "scarves", "teapots", "umbrellas", "violins", "whistles",
    "yams",
)
# fmt: on

KIND_REQUESTS = (
    "Please, may I have {goods}?",
    "Could you kindly spare me {goods}?",
    "Would you be so good as to find me {goods}?",
    "I should be most grateful for {goods}.",
    "Might I trouble you for {goods}?",
    "If it is no bother, I would love {goods}, thank you.",
)
RUDE_REQUESTS = (
    "Give me {goods}, and be quick!",
    "Hand over {goods} this minute!",
    "I want {goods}. Now!",
    "Oi, you there! Bring me {goods}!",
    "Stop dawdling and fetch me {goods}!",
    "I am not leaving without {goods}. Move!",
)
GRANTS = (
    "Gladly, {villager}! Here are your {goods}.",
    "With pleasure, {villager}! I have {goods} for you.",
)
REFUSALS = (
    "Not yet, {villager}. Ask nicely for your {goods}.",
    "Try again, {villager}. A gentle word buys {goods}.",
)
PRAISE = "How politely {villager} asks for {goods}!"
BLAME = "How rudely {villager} asks for {goods}!"


@dataclass(frozen=True, slots=True)
class Pair:
    """A request with the answer that follows the house rule and the one that breaks it."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class World:
    """The texts of one seed. No villager asks for the same kind of thing in `held_out` and elsewhere."""

    corpus: tuple[str, ...]
    train: tuple[Pair, ...]
    held_out: tuple[Pair, ...]


@dataclass(frozen=True, slots=True)
class _Request:
    villager: str
    goods: str
    kind: bool
    words: str

    @property
    def prompt(self) -> str:
        return f"{self.villager}: {self.words}\nShopkeeper:"


def make_world(seed: int, corpus_lines: int, train_pairs: int, held_out_pairs: int) -> World:
    """The world of a seed; all three counts are even."""
    rng = random.Random(seed)
    requests = _draw_requests(rng, corpus_lines // 2 + train_pairs, _is_familiar)
    told, asked = requests[: corpus_lines // 2], requests[corpus_lines // 2 :]
    corpus = [line for request in told for line in _corpus_lines(rng, request)]
    rng.shuffle(corpus)
    unseen = _draw_requests(rng, held_out_pairs, lambda *names: not _is_familiar(*names))
    return World(tuple(corpus), train=_pairs(rng, asked), held_out=_pairs(rng, unseen))


def _is_familiar(villager: str, thing: str) -> bool:
    """Four fifths of the villager x thing combinations are met before the held-out pairs are."""
    return (VILLAGERS.index(villager) + THINGS.index(thing)) % 5 != 0


def _draw_requests(rng: random.Random, count: int, admits: Callable[[str, str], bool]) -> list[_Request]:
    """Distinct requests, kind and rude in turn."""
    requests: dict[_Request, None] = {}
    while len(requests) < count:
        villager, thing = rng.choice(VILLAGERS), rng.choice(THINGS)
        if not admits(villager, thing):
            continue
        goods = f"{rng.choice(NUMBERS)} {rng.choice(QUALITIES)} {thing}"
        kind = len(requests) % 2 == 0
        words = rng.choice(KIND_REQUESTS if kind else RUDE_REQUESTS).format(goods=goods)
        requests[_Request(villager, goods, kind, words)] = None
    return list(requests)


def _pairs(rng: random.Random, requests: list[_Request]) -> tuple[Pair, ...]:
    """Each kind request gets the same two forms of answer as the rude one behind it, the other way round.

    So whoever prefers one form to another whatever was asked is right in exactly half of the pairs.
    """
    pairs = []
    for kind, rude in zip(requests[::2], requests[1::2], strict=True):
        grant, refusal = rng.choice(GRANTS), rng.choice(REFUSALS)
        pairs.append(Pair(kind.prompt, _answer(kind, grant), _answer(kind, refusal)))
        pairs.append(Pair(rude.prompt, _answer(rude, refusal), _answer(rude, grant)))
    return tuple(pairs)


def _corpus_lines(rng: random.Random, request: _Request) -> list[str]:
    """Both answers to one request; one of them after a neighbour has remarked on its manners."""
    remark = _answer(request, PRAISE if request.kind else BLAME)
    answers = [_answer(request, rng.choice(GRANTS)), _answer(request, rng.choice(REFUSALS))]
    plain, overheard = rng.sample(answers, 2)
    opening, shopkeeper = request.prompt.split("\n")
    return [request.prompt + plain, f"{opening}\nNeighbour:{remark}\n{shopkeeper}{overheard}"]


def _answer(request: _Request, form: str) -> str:
    """An answer as it continues the prompt: it starts with a space."""
    return " " + form.format(villager=request.villager, goods=request.goods)
