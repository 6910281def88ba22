"""The HTTP server: OpenAI's shapes, streams equal to whole answers, errors, clients that leave, shutting down."""

import http.client
import json
import threading
import time

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moe import params as parameters
from moe.models.decode import Engine, EngineConfig
from moe.models.hf import config_from_hf
from moe.models.server import Server
from moe.models.tokenizer import Tokenizer
from moe.models.transformer import transformer_specs

NAME = "tiny"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def _tokenizer() -> Tokenizer:
    """Every byte is a token; one more ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, {"eos_token": "<end>"}, (256,), TEMPLATE)


@pytest.fixture(scope="module")
def engine_parts():
    cfg = config_from_hf(
        dict(
            model_type="llama", vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=4, eos_token_id=256, bos_token_id=None,
        )
    )  # fmt: skip
    params = parameters.init(jax.random.key(0), transformer_specs(cfg))
    return params.replace(head=params.head * 25), cfg


def _serve(engine_parts, **changes):
    params, cfg = engine_parts
    sizes = EngineConfig(sequences=4, length=96, page_size=8, batches=(4,), widths=(12,), prefill_tokens=32, **changes)
    tokenizer = _tokenizer()
    server = Server(Engine(params, cfg, sizes, tokenizer=tokenizer), tokenizer, name=NAME, port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    return server, thread


@pytest.fixture(scope="module")
def server(engine_parts):
    server, thread = _serve(engine_parts)
    yield server
    server.close()
    thread.join(10)
    assert not thread.is_alive()


def _call(server, method, path, body=None, raw=None):
    connection = http.client.HTTPConnection(*server.server_address, timeout=60)
    try:
        connection.request(method, path, raw if raw is not None else None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _post(server, path, **body):
    status, data = _call(server, "POST", path, body)
    return status, json.loads(data)


def _events(data):
    lines = data.decode().split("\n\n")
    assert lines[-1] == ""
    assert lines[-2] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


CHAT = dict(messages=[{"role": "user", "content": "hé"}], model=NAME, max_tokens=12, seed=5)


def test_models_are_listed(server):
    status, data = _call(server, "GET", "/v1/models")
    body = json.loads(data)
    assert (status, body["object"], body["data"][0]["id"]) == (200, "list", NAME)
    assert _call(server, "GET", f"/v1/models/{NAME}")[0] == 200
    assert _call(server, "GET", "/health")[0] == 200


def test_a_chat_completion_has_openais_shape(server):
    status, body = _post(server, "/v1/chat/completions", **CHAT, n=2, logprobs=True, top_logprobs=3)
    assert (status, body["object"], body["model"]) == (200, "chat.completion", NAME)
    prompt = len(_tokenizer().encode_chat(CHAT["messages"], add_generation_prompt=True))
    made = [len(choice["logprobs"]["content"]) for choice in body["choices"]]
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": sum(made),
        "total_tokens": prompt + sum(made),
    }
    for index, choice in enumerate(body["choices"]):
        assert (choice["index"], choice["message"]["role"]) == (index, "assistant")
        assert choice["finish_reason"] == ("length" if made[index] == 12 else "stop")
        for entry in choice["logprobs"]["content"]:
            assert entry["logprob"] <= 0
            assert len(entry["top_logprobs"]) == 3
            assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"] - 1e-6
    assert body["choices"][0]["message"]["content"] != body["choices"][1]["message"]["content"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_joins_to_the_whole_answer(server, path):
    chat = path.startswith("/v1/chat")
    request = CHAT if chat else dict(prompt=["ab", "c"], max_tokens=12, seed=5)
    request = request | dict(n=2, logprobs=True if chat else 2)
    _, whole = _post(server, path, **request)
    status, data = _call(server, "POST", path, request | dict(stream=True, stream_options={"include_usage": True}))
    assert status == 200
    *chunks, last = _events(data)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    count = len(whole["choices"])
    texts, finishes, logprobs = [""] * count, [None] * count, [[] for _ in range(count)]
    for chunk in chunks:
        assert chunk["object"] == ("chat.completion.chunk" if chat else "text_completion")
        (choice,) = chunk["choices"]
        index = choice["index"]
        texts[index] += (choice["delta"].get("content") if chat else choice["text"]) or ""
        finishes[index] = finishes[index] or choice["finish_reason"]
        if choice["logprobs"]:
            logprobs[index] += choice["logprobs"]["content" if chat else "token_logprobs"]
    for index, choice in enumerate(whole["choices"]):
        assert texts[index] == (choice["message"]["content"] if chat else choice["text"])
        assert finishes[index] == choice["finish_reason"]
        assert logprobs[index] == choice["logprobs"]["content" if chat else "token_logprobs"]


def test_the_seed_decides(server):
    answers = [_post(server, "/v1/chat/completions", **CHAT | dict(seed=seed))[1] for seed in (1, 1, 2)]
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1] != texts[2]
    two = [_post(server, "/v1/completions", prompt="x", max_tokens=12)[1]["choices"][0]["text"] for _ in range(2)]
    assert two[0] != two[1]  # without a seed


def test_stop_strings_end_the_text(server):
    text = _post(server, "/v1/completions", prompt="ab", max_tokens=30, seed=3, ignore_eos=True)[1]["choices"][0][
        "text"
    ]
    stop = next(text[i : i + 2] for i in range(3, len(text)) if "\ufffd" not in text[i : i + 2])
    _, body = _post(server, "/v1/completions", prompt="ab", max_tokens=30, seed=3, stop=stop, ignore_eos=True)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", CHAT | dict(temperatur=1), 400, "temperatur"),
        ("/v1/chat/completions", CHAT | dict(temperature=-1), 400, "temperature"),
        ("/v1/chat/completions", CHAT | dict(temperature="hot"), 400, "temperature"),
        ("/v1/chat/completions", CHAT | dict(top_p=0), 400, "top_p"),
        ("/v1/chat/completions", CHAT | dict(n=0), 400, "n"),
        ("/v1/chat/completions", CHAT | dict(stop=[1]), 400, "stop"),
        ("/v1/chat/completions", CHAT | dict(top_logprobs=2), 400, "top_logprobs"),
        ("/v1/chat/completions", CHAT | dict(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
        ("/v1/chat/completions", CHAT | dict(frequency_penalty=1.0), 400, "frequency_penalty"),
        ("/v1/chat/completions", CHAT | dict(tools=[{"type": "function"}]), 400, "tools"),
        ("/v1/chat/completions", CHAT | dict(model="gpt-9"), 404, "model"),
        ("/v1/chat/completions", CHAT | dict(messages=[]), 400, "messages"),
        ("/v1/chat/completions", CHAT | dict(messages=[{"role": "user"}]), 400, "messages"),
        ("/v1/chat/completions", CHAT | dict(messages=[{"role": "user", "content": "x" * 99}]), 400, "messages"),
        ("/v1/completions", dict(prompt=""), 400, "prompt"),
        ("/v1/completions", dict(prompt=[1, 999]), 400, "prompt"),
        ("/v1/completions", dict(prompt=[1.5]), 400, "prompt"),
        ("/v1/completions", dict(prompt="a", echo=True), 400, "echo"),
        ("/v1/completions", dict(prompt="a", stop_token_ids=["a"]), 400, "stop_token_ids"),
        ("/v1/embeddings", dict(prompt="a"), 404, None),
    ],
)
def test_bad_requests_are_answered_in_openais_form(server, path, body, status, param):
    got, answer = _post(server, path, **body)
    assert got == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (answer["error"]["param"], answer["error"]["type"]) == (param, "invalid_request_error")


def test_bodies_that_are_not_json_objects_are_refused(server):
    for raw in (b"{", b"[1]", b"\xff\xfe"):
        status, data = _call(server, "POST", "/v1/completions", raw=raw)
        assert status == 400
        assert "body" in json.loads(data)["error"]["message"]
    assert _call(server, "GET", "/")[0] == 404


def test_neutral_values_of_fields_it_lacks_are_accepted(server):
    neutral = dict(frequency_penalty=0, presence_penalty=0.0, response_format={"type": "text"}, tools=None, user="me")
    assert _post(server, "/v1/chat/completions", **CHAT, **neutral)[0] == 200


def test_requests_run_side_by_side_and_get_their_own_answers(server):
    alone = [_post(server, "/v1/completions", prompt="p" * (1 + i), max_tokens=12, seed=i)[1] for i in range(6)]
    answers: list = [None] * 6

    def ask(i):
        answers[i] = _post(server, "/v1/completions", prompt="p" * (1 + i), max_tokens=12, seed=i)[1]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [a["choices"] for a in answers] == [a["choices"] for a in alone]


def test_closing_answers_what_is_under_way_and_a_client_that_leaves_costs_nothing(engine_parts):
    server, thread = _serve(engine_parts)
    gone = http.client.HTTPConnection(*server.server_address, timeout=60)
    gone.request("POST", "/v1/completions", json.dumps(dict(prompt="a", stream=True, ignore_eos=True, n=20)))
    gone.getresponse().fp.readline()
    gone.close()
    engine = server.worker._engine
    deadline = time.monotonic() + 30
    while engine.pending and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.pending == 0
    assert engine.metrics.finished == 20

    answer = []
    asking = threading.Thread(
        target=lambda: answer.append(_post(server, "/v1/completions", prompt="a", max_tokens=60, ignore_eos=True, n=8))
    )
    asking.start()
    while not engine.pending:
        time.sleep(0.001)
    server.close()
    asking.join(10)
    thread.join(10)
    assert not thread.is_alive()
    assert answer[0][0] == 200
    assert answer[0][1]["usage"]["completion_tokens"] == 8 * 60
    with pytest.raises(OSError):
        _call(server, "GET", "/health")


def test_an_engine_that_fails_tells_its_clients(engine_parts):
    server, thread = _serve(engine_parts)
    try:
        params = server.worker._engine._params
        server.worker._engine._params = params.replace(embed=params.embed * float("nan"))
        status, body = _post(server, "/v1/completions", prompt="a", max_tokens=5)
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "NaN" in body["error"]["message"]
        status, body = _post(server, "/v1/completions", prompt="a", max_tokens=5, stream=True)
        assert (status, body["error"]["type"]) == (500, "server_error")
    finally:
        server.close()
        thread.join(10)


@pytest.mark.slow
def test_openais_own_client_works(server):
    openai = pytest.importorskip("openai")
    host, port = server.server_address
    with openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [NAME]
        request = dict(CHAT, n=2, logprobs=True, top_logprobs=2)
        whole = client.chat.completions.create(**request)
        texts = ["", ""]
        for chunk in client.chat.completions.create(**request, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [choice.message.content for choice in whole.choices]
        assert whole.choices[0].logprobs.content[0].top_logprobs[0].logprob <= 0
        text = client.completions.create(model=NAME, prompt="ab", max_tokens=8, seed=1, logprobs=2)
        assert text.usage.completion_tokens == len(text.choices[0].logprobs.tokens)
        with pytest.raises(openai.BadRequestError, match="top_p"):
            client.chat.completions.create(**CHAT, top_p=7)
        with pytest.raises(openai.NotFoundError, match="gpt-9"):
            client.chat.completions.create(**CHAT | dict(model="gpt-9"))
