"""moe.tasks and moe.text: problems with answers that check out, wrong ones that do not, held-out ones never trained."""

import pytest

from moe import tasks, text
from moe.tasks import FAMILIES, Problem, TaskConfig, TaskError, check, problems


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_pass_and_damaged_answers_fail(family):
    for problem in problems(TaskConfig(families=(family,)), 300, seed=1):
        assert check(problem, problem.answer)
        assert check(problem, problem.answer + "\n")
        wrong = {"brackets": {" yes": " no", " no": " yes"}}.get(family, {}).get(problem.answer)
        for bad in (wrong or problem.answer + " 7", "", problem.answer + " x", " ?"):
            assert not check(problem, bad), (problem, bad)


@pytest.mark.parametrize(
    ("family", "prompt", "good", "bad"),
    [
        ("add", "19 + 3 =", "22", "23"),
        ("modular", "21 + 20 mod 9 =", "5", "41"),
        ("steps", "start 4 less 1 plus 8 less 6 :", "3 11 5", "5 3 11"),
        ("copy", "copy f y i :", "f y i", "f i y"),
        ("reverse", "reverse n g k :", "k g n", "n g k"),
        ("sort", "sort 6 8 9 8 :", "6 8 8 9", "6 8 9"),
        ("brackets", "balanced ( [ ) ] ?", "no", "yes"),
        ("brackets", "balanced [ ( ) ] ?", "yes", "no"),
    ],
)
def test_checkers_know_right_from_wrong(family, prompt, good, bad):
    assert check(Problem(family, prompt, ""), good)
    assert not check(Problem(family, prompt, ""), bad)


def test_held_out_prompts_never_occur_in_training_whatever_the_seed():
    cfg = TaskConfig()
    held = {p.prompt for seed in (0, 1) for p in problems(cfg, 60, seed=seed, held_out=True)}
    trained = {p.prompt for seed in (0, 1, 2) for p in problems(cfg, 3000, seed=seed)}
    assert len(held) > 60 * len(FAMILIES)
    assert not held & trained


def test_held_out_problems_are_different_and_both_answers_occur():
    test = problems(TaskConfig(), 100, seed=0, held_out=True)
    assert len({p.prompt for p in test}) == len(test) == 100 * len(FAMILIES)
    yes = sum(p.answer == " yes" for p in test)
    assert 25 <= yes <= 75


def test_the_seed_decides():
    cfg = TaskConfig()
    assert problems(cfg, 20, seed=3) == problems(cfg, 20, seed=3)
    assert problems(cfg, 20, seed=3) != problems(cfg, 20, seed=4)


def test_errors_name_the_value():
    with pytest.raises(TaskError, match="family 'addd'"):
        TaskConfig(families=("addd",))
    with pytest.raises(TaskError, match="digits 0"):
        TaskConfig(digits=0)
    with pytest.raises(TaskError, match="family 'add' gave"):
        problems(TaskConfig(families=("add",), digits=1), 50, seed=0, held_out=True)
    assert tasks.HELD_OUT_EVERY == 10


@pytest.fixture(scope="module")
def prose():
    return text.installed_prose(("optax", "numpy"))


def test_the_installation_holds_prose(prose):
    assert sum(map(len, prose)) > 500_000
    words = " ".join(prose).split()
    assert words.count("the") / len(words) > 0.04, "English: about one word in twenty"
    assert ">>>" not in "".join(prose)


def test_no_paragraph_is_repeated_and_the_order_is_fixed(prose):
    paragraphs = [p for document in prose for p in document.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert text.installed_prose(("optax", "numpy")) == prose


def test_held_out_documents_depend_on_themselves_only(prose):
    kept, out = text.held_out(prose)
    assert sorted(kept + out) == sorted(prose)
    assert 0.01 < len(out) / len(prose) < 0.15
    _, fewer = text.held_out(prose[::2])
    assert fewer == [d for d in prose[::2] if d in set(out)]


def test_files_of_the_user(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt").write_text(" \n")
    assert text.read_documents([tmp_path / "a.txt"]) == ["One.\n"]
    long = "".join(f"Paragraph {i} of many.\n\n" for i in range(40))
    (tmp_path / "d.txt").write_text(long)
    parts = text.read_documents([tmp_path / "d.txt"], characters=100)
    assert "".join(parts) == long
    assert len(parts) > 5
    with pytest.raises(text.TextError, match="too few"):
        text.held_out(["One."])
    for name, message in (("b.txt", "not UTF-8"), ("c.txt", "holds no text")):
        with pytest.raises(text.TextError, match=message):
            text.read_documents([tmp_path / name])
