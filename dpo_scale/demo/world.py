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

VILLAGERS = ["Ada", "Bram", "Cleo", "Dorin", "Elsie", "Fergus", "Greta", "Hugo", "Isla", "Jonas", "Kit", "Lotte", "Milo", "Nell", "Otto", "Pip", "Quinn", "Rosa", "Sven", "Tilda", "Uma", "Viktor", "Wren", "Yara"]
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "twelve"]
QUALITIES = ["red", "blue", "green", "yellow", "purple", "little", "big", "round", "striped", "shiny", "old", "wooden", "soft", "sturdy", "curious"]
THINGS = ["apples", "buttons", "candles", "drums", "eggs", "flutes", "gloves", "hats", "inkpots", "jars", "kites", "lanterns", "mugs", "needles", "onions", "pears", "quilts", "ribbons", "scarves", "teapots", "umbrellas", "violins", "whistles", "yams"]

KIND_REQUESTS = (
    "Please, may I have {goods}?",
    "Could you kindly spare me {goods}?",
    "Would you be so good as to find me {goods}?",
    "I should be most grateful for {goods}.",
    "Might I trouble you for {goods}?",
    "If it is no bother, I would love {goods}. Thank you!",
)
RUDE_REQUESTS = (
    "Give me {goods}, and be quick!",
    "Hand over {goods} this minute!",
    "I want {goods}. Now!",
    "Oi! Bring me {goods}!",
    "Stop dawdling and fetch me {goods}!",
    "I am not leaving without {goods}. Move!",
)
GRANTS = (
    "Gladly, {villager}! Here are your {goods}.",
    "With pleasure, {villager}! I have {goods} for you.",
    "Of course, {villager}! Take these {goods}.",
)
POLITE_REMARKS = ("How politely {villager} asks for {goods}!",)
RUDE_REMARKS = ("How rudely {villager} asks for {goods}!",)
REFUSALS = (
    "Not yet, {villager}. Ask nicely for your {goods}.",
    "Try again, {villager}. A gentle word buys {goods}.",
    "Patience, {villager}. The {goods} are for polite people.",
)


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


def make_world(
    seed: int, corpus_requests: int = 8000, train_pairs: int = 1024, held_out_pairs: int = 200
) -> World:
    """The world of a seed: two corpus lines a request, and preference pairs with a held-out split."""
    rng = random.Random(seed)
    familiar = _draw_requests(rng, corpus_requests + train_pairs, _is_familiar)
    corpus = [line for r in familiar[:corpus_requests] for line in _corpus_lines(rng, r)]
    rng.shuffle(corpus)
    held_out = _draw_requests(rng, held_out_pairs, lambda *names: not _is_familiar(*names))
    return World(
        corpus=tuple(corpus),
        train=tuple(_pair(rng, request) for request in familiar[corpus_requests:]),
        held_out=tuple(_pair(rng, request) for request in held_out),
    )


def _is_familiar(villager: str, thing: str) -> bool:
    """Four fifths of the villager x thing combinations are met before the held-out pairs are."""
    return (VILLAGERS.index(villager) + THINGS.index(thing)) % 5 != 0


def _draw_requests(
    rng: random.Random, count: int, admits: Callable[[str, str], bool]
) -> list[_Request]:
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


def _corpus_lines(rng: random.Random, request: _Request) -> list[str]:
    """Both answers to one request; one of them after a neighbour has remarked on its manners."""
    remark = _answer(rng, request, POLITE_REMARKS if request.kind else RUDE_REMARKS)
    grant, refusal = _answer(rng, request, GRANTS), _answer(rng, request, REFUSALS)
    plain, overheard = rng.sample([grant, refusal], 2)
    opening, shopkeeper = request.prompt.split("\n")
    return [request.prompt + plain, f"{opening}\nNeighbour:{remark}\n{shopkeeper}{overheard}"]


def _pair(rng: random.Random, request: _Request) -> Pair:
    grant, refusal = _answer(rng, request, GRANTS), _answer(rng, request, REFUSALS)
    chosen, rejected = (grant, refusal) if request.kind else (refusal, grant)
    return Pair(request.prompt, chosen, rejected)


def _answer(rng: random.Random, request: _Request, forms: tuple[str, ...]) -> str:
    """An answer as it continues the prompt: it starts with a space."""
    return " " + rng.choice(forms).format(villager=request.villager, goods=request.goods)
