"""English prose that every installation has: the documentation inside the Python files of the standard library and of
the scientific packages this library depends on.

    documents = installed_prose()            # the same list on every machine with the same versions

It is text about numbers and computing by many authors (licences: PSF, BSD, Apache-2.0), about 4 MB, and no substitute
for a corpus; it is real, and there without a download.
"""

import ast
import hashlib
import importlib.util
import inspect
import pathlib
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Sequence

PACKAGES = ("numpy", "scipy", "pandas", "sklearn", "xarray", "matplotlib", "jax", "optax", "zarr")
_SKIPPED = {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "externals", "_vendor", "vendored"}
_SHORTEST = 80  # characters of a paragraph


class TextError(ValueError):
    """No text, or none long enough. The message names the file or value and the remedy."""


def _paragraphs(doc: str) -> Iterable[str]:
    """The prose in a docstring: blocks of running lines, joined. Tables, code, lists of names and headings are left
    out by what they look like: short, with prompts or rulers, or too few of their characters letters.
    """
    for block in re.split(r"\n\s*\n", inspect.cleandoc(doc)):
        lines = block.split("\n")
        if re.match(r"\S.* : |\w+\n( {4}|-)", block):  # numpydoc: the description follows the parameter's name
            block = "\n".join(lines[1:])
        text = " ".join(textwrap.dedent(block).split())
        if len(text) < _SHORTEST or re.search(r">>>|\.\. |--|==|::|\|", text) or not text.endswith((".", "?", "!")):
            continue
        if sum(c.isalpha() or c == " " for c in text) >= 0.9 * len(text) and text.isascii():
            yield text


def _docstrings(path: pathlib.Path) -> Iterable[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = ast.get_docstring(node, clean=False)
            if doc:
                yield doc


def installed_prose(packages: Sequence[str] = PACKAGES) -> list[str]:
    """One document for every Python file with at least one new paragraph, in the order of the files' names.

    A paragraph that has occurred before, anywhere, is left out: no text of one document is repeated in another, so that
    documents can be held out.

    Raises:
        TextError: nothing was found (an installation without sources).
    """
    roots = [("", pathlib.Path(sysconfig.get_paths()["stdlib"]))]
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            roots.append((package, pathlib.Path(spec.origin).parent))
    seen: set[bytes] = set()
    documents = []
    for _, root in roots:
        for path in sorted(root.rglob("*.py")):
            if _SKIPPED.intersection(path.relative_to(root).parts):
                continue
            kept = []
            for doc in _docstrings(path):
                for text in _paragraphs(doc):
                    digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
                    if digest not in seen:
                        seen.add(digest)
                        kept.append(text)
            if kept:
                documents.append("\n".join(kept))
    if not documents:
        raise TextError(f"no documentation in the Python files of {', '.join(packages)}; pass text files of your own")
    return documents


def read_documents(paths: Iterable[str | pathlib.Path], *, characters: int = 1000) -> list[str]:
    """The text files (UTF-8), cut at blank lines into documents of at least `characters` where a file is longer.

    Raises:
        TextError: an empty file, or one that is not UTF-8.
    """
    documents = []
    for path in map(pathlib.Path, paths):
        try:
            content = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 ({error}); convert it first") from error
        if not content.strip():
            raise TextError(f"{path} holds no text; leave it out")
        current = ""
        for block in re.split(r"(?<=\n)(?=\s*\n)", content):
            current += block
            if len(current) >= characters:
                documents.append(current)
                current = ""
        if current.strip():
            documents.append(current)
        elif current:
            documents[-1] += current
    return documents


def held_out(documents: Sequence[str], every: int = 20) -> tuple[list[str], list[str]]:
    """(training, held-out) documents: about one in `every`, chosen by a digest of its own text, so that the choice does
    not depend on what else is there.

    Raises:
        TextError: none is left on one side.
    """
    kept, out = [], []
    for text in documents:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        (out if number % every == 0 else kept).append(text)
    if not kept or not out:
        raise TextError(
            f"{len(documents)} documents, {len(out)} of them held out, are too few to train and test on; give more text"
        )
    return kept, out
