"""Small problems with exact checkers, by seed: what a small language model can be trained to solve, and be caught at.

    train = problems(TaskConfig(), 10_000, seed=0)
    test = problems(TaskConfig(), 100, seed=0, held_out=True)
    check(test[0], completion)

A prompt's own digest decides whether it is held out (one in ten), so no held-out prompt is ever drawn for training,
whatever the seeds and counts. Checkers read the prompt, not a stored answer.

Families: "add" (two numbers), "modular" (a + b mod m), "steps" (a running sum, each step written out), "copy",
"reverse" (letters), "sort" (digits), "brackets" (is it balanced?).
"""

import dataclasses
import hashlib
import random
import re
import string
from collections.abc import Callable

HELD_OUT_EVERY = 10


class TaskError(ValueError):
    """A family that does not exist, or more problems than there are. The message names the value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A prompt, and an answer that a model can learn to write; others may be right too (`check`)."""

    family: str
    prompt: str
    answer: str


def _add(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    a, b = (rng.randrange(10 ** rng.randint(1, cfg.digits)) for _ in range(2))
    return f"{a} + {b} =", f" {a + b}"


def _modular(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    m = rng.randint(2, 9)
    a, b = rng.randrange(cfg.largest), rng.randrange(cfg.largest)
    return f"{a} + {b} mod {m} =", f" {(a + b) % m}"


def _steps(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    now = rng.randrange(10)
    prompt, states = f"start {now}", []
    for _ in range(rng.randint(2, cfg.steps)):
        change = rng.randint(1, 9)
        if rng.random() < 0.5 and change <= now:
            prompt, now = f"{prompt} less {change}", now - change
        else:
            prompt, now = f"{prompt} plus {change}", now + change
        states.append(now)
    return f"{prompt} :", "".join(f" {state}" for state in states)


def _letters(rng: random.Random, cfg: "TaskConfig") -> list[str]:
    return [rng.choice(string.ascii_lowercase) for _ in range(rng.randint(3, cfg.length))]


def _copy(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    letters = _letters(rng, cfg)
    return f"copy {' '.join(letters)} :", "".join(f" {c}" for c in letters)


def _reverse(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    letters = _letters(rng, cfg)
    return f"reverse {' '.join(letters)} :", "".join(f" {c}" for c in reversed(letters))


def _sort(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    digits = [rng.choice(string.digits) for _ in range(rng.randint(3, cfg.length))]
    return f"sort {' '.join(digits)} :", "".join(f" {c}" for c in sorted(digits))


def _balanced(rng: random.Random, pairs: int) -> str:
    if pairs == 0:
        return ""
    inside = rng.randrange(pairs)
    left, right = rng.choice(("()", "[]"))
    return left + _balanced(rng, inside) + right + _balanced(rng, pairs - 1 - inside)


def _brackets(rng: random.Random, cfg: "TaskConfig") -> tuple[str, str]:
    text = list(_balanced(rng, rng.randint(max(2, cfg.pairs - 2), cfg.pairs)))
    if rng.random() < 0.5:  # one bracket changed: what it was is a fair guess otherwise
        at = rng.randrange(len(text))
        text[at] = rng.choice([c for c in "()[]" if c != text[at]])
    return f"balanced {' '.join(text)} ?", " yes" if _closes(text) else " no"


def _closes(text: list[str]) -> bool:
    open_: list[str] = []
    for c in text:
        if c in "([":
            open_.append(c)
        elif not open_ or open_.pop() + c not in ("()", "[]"):
            return False
    return not open_


def _numbers(text: str) -> list[int] | None:
    """The integers of a text that holds nothing else."""
    words = text.split()
    return [int(word) for word in words] if words and all(re.fullmatch(r"\d+", word) for word in words) else None


def _check_add(prompt: str, answer: str) -> bool:
    a, b = map(int, re.findall(r"\d+", prompt))
    return _numbers(answer) == [a + b]


def _check_modular(prompt: str, answer: str) -> bool:
    a, b, m = map(int, re.findall(r"\d+", prompt))
    return _numbers(answer) == [(a + b) % m]


def _check_steps(prompt: str, answer: str) -> bool:
    signs = {"start": 1, "plus": 1, "less": -1}
    changes = [signs[word] * int(number) for word, number in re.findall(r"(\w+) (\d+)", prompt)]
    found = _numbers(answer)
    return found is not None and len(found) == len(changes) - 1 and found[-1] == sum(changes)


def _items(prompt: str) -> list[str]:
    return prompt.split()[1:-1]


def _check_copy(prompt: str, answer: str) -> bool:
    return answer.split() == _items(prompt)


def _check_reverse(prompt: str, answer: str) -> bool:
    return answer.split() == _items(prompt)[::-1]


def _check_sort(prompt: str, answer: str) -> bool:
    return answer.split() == sorted(_items(prompt))


def _check_brackets(prompt: str, answer: str) -> bool:
    text = "".join(_items(prompt))
    shorter = None
    while shorter != text:  # another algorithm than the generator's
        shorter, text = text, text.replace("()", "").replace("[]", "")
    return answer.split() == ["no" if text else "yes"]


_FAMILIES: dict[str, tuple[Callable[..., tuple[str, str]], Callable[[str, str], bool]]] = {
    "add": (_add, _check_add),
    "modular": (_modular, _check_modular),
    "steps": (_steps, _check_steps),
    "copy": (_copy, _check_copy),
    "reverse": (_reverse, _check_reverse),
    "sort": (_sort, _check_sort),
    "brackets": (_brackets, _check_brackets),
}
FAMILIES = tuple(_FAMILIES)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which problems, and how hard.

    Attributes:
        families: of FAMILIES.
        digits: most digits of a number in "add".
        largest: numbers of "modular" are below it.
        steps: most steps of "steps".
        length: most letters or digits of "copy", "reverse", "sort"; at least 3.
        pairs: most pairs of "brackets"; at least 2.
    """

    families: tuple[str, ...] = FAMILIES
    digits: int = 2
    largest: int = 30
    steps: int = 4
    length: int = 6
    pairs: int = 6

    def __post_init__(self):
        for family in self.families:
            if family not in _FAMILIES:
                raise TaskError(f"family {family!r} is not one of {', '.join(map(repr, FAMILIES))}")
        if not self.families:
            raise TaskError(f"no families; choose some of {', '.join(FAMILIES)}")
        for name, least in (("digits", 1), ("largest", 2), ("steps", 2), ("length", 3), ("pairs", 2)):
            if getattr(self, name) < least:
                raise TaskError(f"{name} {getattr(self, name)} must be at least {least}")


def is_held_out(prompt: str) -> bool:
    """Whether this prompt belongs to the held-out tenth."""
    number = int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")
    return number % HELD_OUT_EVERY == 0


def problems(cfg: TaskConfig, count: int, *, seed: int, held_out: bool = False, fewer: bool = False) -> list[Problem]:
    """`count` problems of every family, family by family.

    Args:
        seed: problem i of a family is a function of (seed, family, and the draws before it).
        held_out: only prompts that training never sees, each once; otherwise only the others, with repetitions where a
            family is small.
        fewer: a family with fewer different held-out problems gives those that it has.

    Raises:
        TaskError: fewer than `count` different held-out prompts of a family were found in 1,000 draws for each.
    """
    found = []
    for family in cfg.families:
        draw = _FAMILIES[family][0]
        rng = random.Random(f"{seed}/{family}/{held_out}")
        seen: set[str] = set()
        kept: list[Problem] = []
        for _ in range(1000 * count):
            if len(kept) == count:
                break
            prompt, answer = draw(rng, cfg)
            if is_held_out(prompt) == held_out and not (held_out and prompt in seen):
                seen.add(prompt)
                kept.append(Problem(family, prompt, answer))
        if len(kept) < count and not (fewer and kept):
            raise TaskError(
                f"family {family!r} gave {len(kept)} different held-out problems, not {count}; ask for fewer or make "
                "the family larger in TaskConfig"
            )
        found += kept
    return found


def check(problem: Problem, completion: str) -> bool:
    """Whether the completion solves the problem, and is nothing but a solution."""
    return _FAMILIES[problem.family][1](problem.prompt, completion)
