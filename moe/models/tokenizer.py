"""Text to token ids and back, and conversations to text.

A `Tokenizer` wraps the `tokenizers` library and is built from a Hugging Face directory (`from_directory`) or from the
metadata of a GGUF file (`from_gguf_metadata`). Chat templates are Jinja programs that came with the checkpoint and are
not trusted: they run in Jinja's immutable sandbox, see only JSON, and are given what transformers gives them.

    tokenizer = from_directory("SmolLM2-135M-Instruct")
    prompt = tokenizer.encode_chat([{"role": "user", "content": "7 + 5 = ?"}], add_generation_prompt=True)
    stream = tokenizer.stream(skip_special_tokens=True)
    for token in generate(prompt, stop=tokenizer.stop_ids):
        print(stream.push(token), end="")
    print(stream.finish())
"""

import dataclasses
import datetime
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers
from jaxtyping import Shaped
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

PathLike = str | os.PathLike[str]
TokenIds = Sequence[int | np.integer] | Shaped[np.ndarray, "..."]
Messages = Sequence[Mapping[str, Any]]


class TokenizerError(ValueError):
    """Tokenizer files or metadata that are missing, damaged or of a kind that is not supported, or a bad token id."""


class ChatTemplateError(ValueError):
    """A chat template that does not compile, that refuses the messages, or messages that are not JSON."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its special tokens and chat template; immutable and picklable.

    Attributes:
        backend: the `tokenizers.Tokenizer` that does the work.
        special_tokens: {"bos_token": "<s>", ...}, the names transformers uses; chat templates read them.
        stop_ids: ids that end a generation, ascending.
        chat_template: Jinja source, or None.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str]
    stop_ids: tuple[int, ...]
    chat_template: str | None = None

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows (padding)."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written in the text become their ids.

        Args:
            add_special_tokens: add what the tokenizer's post-processor adds (a bos, for some models); pass False for
                text made by `render`, whose template has written them.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        return [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: TokenIds, *, skip_special_tokens: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids beyond the vocabulary nothing."""
        return self.backend.decode(_id_list(ids), skip_special_tokens=skip_special_tokens)

    def stream(self, *, skip_special_tokens: bool = False) -> "TextStream":
        """A decoder for ids that arrive one at a time."""
        return TextStream(self.backend, skip_special_tokens)

    def render(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to see it.

        Equal to transformers' `apply_chat_template(..., tokenize=False)`, which also drops keys whose value is None.

        Args:
            messages: [{"role": "user", "content": "..."}, ...], plain JSON.
            add_generation_prompt: end with the header of an assistant message.
            tools: JSON schemas of functions.
            documents: for templates with retrieval.
            variables: further names that this model's template reads, e.g. enable_thinking=False.

        Raises:
            ChatTemplateError: no template, a template that raises (also by its own `raise_exception`), no message,
                or messages that are not JSON.
        """
        if self.chat_template is None:
            raise ChatTemplateError("this tokenizer has no chat template; put chat_template.jinja beside it")
        if not messages:
            raise ChatTemplateError("the conversation is empty; give at least one message")
        kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
        names = {**self.special_tokens, **_plain(variables, "variables")}
        template = _compile(self.chat_template)
        try:
            return template.render(
                messages=_plain(kept, "messages"),
                tools=_plain(tools, "tools"),
                documents=_plain(documents, "documents"),
                add_generation_prompt=add_generation_prompt,
                **names,
            )
        except Exception as error:  # whatever the template's program did: it is data, like the messages
            raise ChatTemplateError(f"the chat template failed on these messages: {error}") from error

    def encode_chat(self, messages: Messages, **options: Any) -> list[int]:
        """Token ids of `render(messages, **options)`.

        A special token written inside a message's content is taken for the token itself, as in transformers.
        """
        return self.encode(self.render(messages, **options), add_special_tokens=False)

    def save(self, directory: PathLike) -> None:
        """Writes tokenizer.json, tokenizer_config.json, generation_config.json and, where there is one,
        chat_template.jinja, so that `from_directory` and transformers read the same tokenizer.
        """
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        _write_json(folder / "tokenizer_config.json", {**config, **self.special_tokens})
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self.stop_ids) or None, "pad_token_id": self.pad_id}
        _write_json(folder / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")


class TextStream:
    """Text of a growing sequence, in pieces of whole characters.

    A token may end in the middle of a character of UTF-8; its text is held back until the character is complete. The
    pieces and the last one from `finish` join to `decode` of the whole sequence. One exception: tokenizers with byte
    fallback (Llama 2's kind) decode a run of bytes anew with every byte, and a run that turns out not to be UTF-8 may
    rewrite ASCII that was already sent; it stays as it was sent.
    """

    def __init__(self, backend: tokenizers.Tokenizer, skip_special_tokens: bool):
        self._backend = backend
        self._skip = skip_special_tokens
        self._stream: decoders.DecodeStream | None = decoders.DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._sent = 0  # characters of the whole text

    def push(self, token: int | np.integer) -> str:
        """The text that `token` completes, often empty."""
        self._ids += _id_list([token])
        if self._stream is not None:
            try:
                piece = self._stream.step(self._backend, self._ids[-1]) or ""
                self._sent += len(piece)
                return piece
            except Exception:  # the library's bare one for a rewritten text, after which its stream is of no use
                self._stream = None
        return "" if self._whole().endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What is held back; an incomplete character becomes U+FFFD."""
        whole = self._whole()
        rest = whole[self._sent :]
        self._sent = len(whole)
        return rest

    def _whole(self) -> str:
        return self._backend.decode(self._ids, skip_special_tokens=self._skip)


def _id_list(ids: TokenIds) -> list[int]:
    array = np.asarray(ids)
    if array.size == 0:
        return []
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TokenizerError(f"token ids must be a list of integers, got shape {array.shape} of {array.dtype}")
    wrong = np.flatnonzero((array < 0) | (array > np.iinfo(np.uint32).max))
    if wrong.size:
        raise TokenizerError(f"token id {array[wrong[0]]} at position {wrong[0]} is not an id; cut the padding off")
    return array.tolist()


# --- Chat templates ---------------------------------------------------------------------------------------------------


def _plain(value: Any, what: str) -> Any:
    """The value rebuilt from JSON types, so that a template can reach no method of an object of ours."""
    try:
        return json.loads(json.dumps(value, default=_mapping_to_dict))
    except (TypeError, ValueError) as error:
        raise ChatTemplateError(f"{what} of a chat template must be plain JSON: {error}") from error


def _mapping_to_dict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the assistant's words for a loss mask: its body alone."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` for templates without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML; models were trained without."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """The environment of transformers' `apply_chat_template` (trim_blocks, lstrip_blocks, loop controls)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"line {error.lineno} of the chat template is not Jinja: {error.message}") from error


# --- Hugging Face directories -----------------------------------------------------------------------------------------


def from_directory(directory: PathLike) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint.

    Reads tokenizer.json and, where present, special_tokens_map.json, tokenizer_config.json (which wins),
    chat_template.jinja or .json, and the stop ids of generation_config.json and config.json.

    Raises:
        TokenizerError: no tokenizer.json (a SentencePiece model alone is not enough), or a damaged file.
    """
    folder = pathlib.Path(directory)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"{path} does not exist; save the tokenizer with transformers' AutoTokenizer(...).save_pretrained first"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(
            f"{path} is not a tokenizer that tokenizers {tokenizers.__version__} reads: {error}"
        ) from error
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    backend.no_padding()
    backend.no_truncation()
    _add_missing_tokens(backend, config, folder)
    special = {
        name: _token_text(value)
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | Mapping)
    }
    for token in special.values():
        if backend.token_to_id(token) is None:
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
    if "add_bos_token" in config or "add_eos_token" in config:
        _add_ends(backend, special, bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
    stops = set()
    for name in ("generation_config.json", "config.json"):
        ids = _read_json(folder / name).get("eos_token_id")
        stops.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    if "eos_token" in special:
        stops.add(backend.token_to_id(special["eos_token"]))
    return Tokenizer(backend, special, tuple(sorted(stops)), _chat_template(folder, config))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in the file; empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path} is not JSON: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds {type(content).__name__}, not an object; fetch it again")
    return content


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_text(value: str | Mapping[str, Any]) -> str:
    return value if isinstance(value, str) else value["content"]


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Tokens that only tokenizer_config.json knows; their ids follow the vocabulary's, or the files disagree."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    listed = config.get("added_tokens_decoder") or {}
    for number, token in sorted(((int(key), value) for key, value in listed.items()), key=lambda item: item[0]):
        content = token["content"]
        if backend.token_to_id(content) is None:
            backend.add_tokens(
                [tokenizers.AddedToken(content, **{flag: token[flag] for flag in flags if flag in token})]
            )
        if backend.token_to_id(content) != number:
            raise TokenizerError(
                f"{folder}: tokenizer_config.json gives {content!r} the id {number}, tokenizer.json "
                f"{backend.token_to_id(content)}; fetch both from one revision"
            )


def _add_ends(backend: tokenizers.Tokenizer, special: Mapping[str, str], bos: bool, eos: bool) -> None:
    """Makes `encode` put the bos token before and the eos token after the text; replaces other post-processing."""
    before = special.get("bos_token") if bos else None
    after = special.get("eos_token") if eos else None
    single = [f"{before}:0"] * (before is not None) + ["$A:0"] + [f"{after}:0"] * (after is not None)
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(token, backend.token_to_id(token)) for token in {before, after} if token is not None],
    )


def _chat_template(folder: pathlib.Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several named ones
        template = {one["name"]: one["template"] for one in template}.get("default")
    return template


# --- GGUF metadata ----------------------------------------------------------------------------------------------------

# `tokenizer.ggml.token_type`
_CONTROL, _USER_DEFINED = 3, 4


@dataclasses.dataclass(frozen=True)
class _Splitter:
    """What `tokenizer.ggml.pre` names: how text is cut into words before the merges run.

    Attributes:
        build: makes the pre-tokenizer, down to the byte alphabet.
        compose: Unicode NFC first, as the models' own tokenizer.json does (llama.cpp leaves it out).
        ignore_merges: a word that is itself a token is taken whole.
        add_bos: where the file does not say.
    """

    build: Callable[[], pre_tokenizers.PreTokenizer]
    compose: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits() -> pre_tokenizers.PreTokenizer:
    """Digits first: "x =  12" has the two spaces as one token. transformers 5.24 leaves it out for GGUF files and cuts
    that text otherwise than the model's own tokenizer.json and llama.cpp do.
    """
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _regex(digits: str) -> pre_tokenizers.PreTokenizer:
    """The expression of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    expression = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _Splitter(functools.partial(_regex, r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_SPLITTERS = {
    "gpt-2": _Splitter(_gpt2),
    "gpt2": _Splitter(_gpt2),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitter(functools.partial(_regex, r"\p{N}"), compose=True),
    "smollm": _Splitter(_single_digits),
}


def from_gguf_metadata(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file carries (`tokenizer.ggml.model` = "gpt2").

    Args:
        metadata: key -> value; `moe.models.gguf.read_gguf(path).metadata`.

    Raises:
        TokenizerError: a key that is missing, another kind of tokenizer, an unknown pre-tokenizer, or contents that
            do not fit together.
    """

    def required(key: str) -> Any:
        if key not in metadata:
            raise TokenizerError(f"the GGUF metadata has no {key!r}; convert the model again with its tokenizer")
        return metadata[key]

    kind = required("tokenizer.ggml.model")
    if kind != "gpt2":
        raise TokenizerError(
            f"tokenizer.ggml.model is {kind!r}, only byte-level BPE ('gpt2') is read; use from_directory on the "
            "Hugging Face checkpoint"
        )
    pre = required("tokenizer.ggml.pre")
    if pre not in _SPLITTERS:
        raise TokenizerError(
            f"tokenizer.ggml.pre {pre!r} is not one of {sorted(_SPLITTERS)}; use from_directory on the Hugging Face "
            "checkpoint"
        )
    splitter = _SPLITTERS[pre]
    tokens = required("tokenizer.ggml.tokens")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary[token] != number)
        raise TokenizerError(f"tokenizer.ggml.tokens holds {twice!r} twice; convert the model again")
    merges = [tuple(merge.split(" ")) for merge in required("tokenizer.ggml.merges")]
    for number, merge in enumerate(merges):
        if len(merge) != 2:
            raise TokenizerError(
                f"tokenizer.ggml.merges has {' '.join(merge)!r} at {number}, not two tokens and a space"
            )
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitter.ignore_merges)  # type: ignore[arg-type]
        )
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
    if splitter.compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter.build()
    backend.decoder = decoders.ByteLevel()

    types = np.asarray(metadata.get("tokenizer.ggml.token_type", np.ones(len(tokens), np.int32)))
    if types.shape != (len(tokens),):
        raise TokenizerError(f"tokenizer.ggml.token_type has {types.size} entries for {len(tokens)} tokens")
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                tokenizers.AddedToken(tokens[number], normalized=False, special=special)
                for number in np.flatnonzero(types == kind)
            ]
        )

    def token(key: str) -> int | None:
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is not None and not 0 <= number < len(tokens):
            raise TokenizerError(f"tokenizer.ggml.{key}_token_id is {number}, there are {len(tokens)} tokens")
        return number

    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[number] for name, key in named.items() if (number := token(key)) is not None}
    _add_ends(
        backend,
        special,
        bool(metadata.get("tokenizer.ggml.add_bos_token", splitter.add_bos)),
        bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )
    stops = {number for key in ("eos", "eot", "eom") if (number := token(key)) is not None}
    return Tokenizer(backend, special, tuple(sorted(stops)), metadata.get("tokenizer.chat_template"))
