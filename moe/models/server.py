"""An HTTP server that speaks OpenAI's protocol, so that existing clients work with a model of this library.

    python -m moe.models.server --model SmolLM2-135M-Instruct.Q4_1.gguf --port 8000

    POST /v1/chat/completions, /v1/completions     stream, n, stop, seed, logprobs, usage
    GET  /v1/models, /health

Standard library only, one thread per connection and one that owns the engine. Beyond OpenAI's fields it takes top_k,
min_p, ignore_eos and stop_token_ids, as vLLM does. A field that it does not know, or whose value would change the
result in a way that it does not have, is an error and not ignored. There is no authentication: bind it to a local
address or put a proxy before it.
"""

import argparse
import contextlib
import dataclasses
import difflib
import http.server
import json
import os
import pathlib
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from moe.models.decode import (
    ALTERNATIVES,
    Completion,
    DecodeError,
    Engine,
    EngineConfig,
    Event,
    PromptError,
    TextStream,
)
from moe.models.sampling import Sampling, SamplingError

_LARGEST_BODY = 16 * 2**20
_CLOSE_SECONDS = 30  # for clients that read their last answer slowly


@runtime_checkable
class ChatTokenizer(Protocol):
    """What the server needs of a tokenizer; `moe.models.tokenizer.Tokenizer`."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Any, *, add_generation_prompt: bool) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def stream(self, *, skip_special_tokens: bool) -> TextStream: ...


class RequestError(ValueError):
    """A request that is answered with an error in OpenAI's form.

    Attributes:
        status: HTTP status.
        param: the field at fault.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": None}}


# --- The thread that owns the engine ----------------------------------------------------------------------------------


Events = queue.Queue[Event | Exception]


class Worker:
    """Runs an engine in a thread of its own; other threads hand it requests and read their events.

    Args:
        engine: nobody else may call it from now on.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._commands: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._outputs: dict[int, Events] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, prompt: list[int], sampling: Sampling, *, seed: int, key: int, events: Events) -> int:
        """Number of the request, whose events go to `events`. Raises what `Engine.submit` raises."""
        answer: queue.Queue[int | Exception] = queue.Queue()

        def command() -> None:
            try:
                number = self._engine.submit(prompt, sampling, seed=seed, key=key)
            except Exception as error:
                answer.put(error)
                return
            self._outputs[number] = events
            answer.put(number)

        with self._lock:
            if self._closed:
                raise RequestError("the server is shutting down", status=503)
            self._commands.put(command)
        number = answer.get()
        if isinstance(number, Exception):
            raise number
        return number

    def cancel(self, number: int) -> None:
        """Ends a request whose client has gone."""
        self._commands.put(lambda: self._drop(number))

    def _drop(self, number: int) -> None:
        self._outputs.pop(number, None)
        self._engine.cancel(number)

    def close(self) -> None:
        """Finishes what is under way, then stops."""
        with self._lock:
            self._closed = True
            self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        closing = False
        while not closing or self._engine.busy:
            try:
                while True:
                    command = self._commands.get(block=not self._engine.busy and not closing)
                    if command is None:
                        closing = True
                    else:
                        command()
            except queue.Empty:
                pass
            if self._engine.busy:
                self._step()

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception as error:  # a bug or a device failure: every client must hear of it
            for output in self._outputs.values():
                output.put(error)
            for number in list(self._outputs):
                self._drop(number)
            return
        for event in events:
            output = self._outputs.get(event.request)
            if output is not None:
                output.put(event)


# --- Fields of a request ----------------------------------------------------------------------------------------------

_COMMON = frozenset(
    "model stream stream_options n stop seed temperature top_p top_k min_p max_tokens logprobs user ignore_eos "
    "stop_token_ids frequency_penalty presence_penalty logit_bias".split()
)
_CHAT = _COMMON | frozenset(
    "messages max_completion_tokens top_logprobs response_format tools tool_choice parallel_tool_calls store "
    "metadata".split()
)
_TEXT = _COMMON | frozenset("prompt echo best_of suffix".split())
# Values that ask for nothing, of fields that this server does not have.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "metadata": ({},),
    "echo": (False,),
    "suffix": ("",),
}


def _field(body: Mapping[str, Any], name: str, kinds: tuple[type, ...], default: Any) -> Any:
    """A field's value, the default where it is missing or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise RequestError(f"{name} is {value!r}, expected {expected}", param=name)
    return value


def _strings(body: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = _field(body, name, (str, list), [])
    value = [value] if isinstance(value, str) else value
    if not all(isinstance(one, str) for one in value):
        raise RequestError(f"{name} is {value!r}, expected a string or a list of strings", param=name)
    return tuple(value)


def _check_fields(body: Mapping[str, Any], known: frozenset[str]) -> None:
    for name, value in body.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestError(f"unknown field {name!r}{hint}", param=name)
        if name in _NEUTRAL and value is not None and value not in _NEUTRAL[name]:
            raise RequestError(f"{name} = {value!r} is not supported; leave it out", param=name)
    if body.get("best_of") not in (None, body.get("n", 1), 1):
        raise RequestError(f"best_of {body['best_of']!r} is not supported; use n", param="best_of")


@dataclasses.dataclass(frozen=True)
class _Request:
    """A request as the engine takes it."""

    chat: bool
    prompts: list[list[int]]
    sampling: Sampling
    seed: int
    stream: bool
    usage: bool
    logprobs: bool


def _parse(body: Any, chat: bool, tokenizer: ChatTokenizer, default_tokens: int | None) -> _Request:
    if not isinstance(body, dict):
        raise RequestError(f"the body is JSON of type {type(body).__name__}, not an object")
    _check_fields(body, _CHAT if chat else _TEXT)
    number = (int, float)
    if chat:
        logprobs = _field(body, "logprobs", (bool,), False)
        top = _field(body, "top_logprobs", (int,), 0)
        if top and not logprobs:
            raise RequestError("top_logprobs needs logprobs = true", param="top_logprobs")
        prompts = [_chat_prompt(body, tokenizer)]
    else:
        top = _field(body, "logprobs", (int,), None)
        logprobs, top = top is not None, top or 0
        prompts = _text_prompts(body, tokenizer)
    if not 0 <= top <= ALTERNATIVES:
        raise RequestError(f"{top} alternatives are outside [0, {ALTERNATIVES}]", param="top_logprobs")
    tokens = _field(body, "max_completion_tokens", (int,), None) if chat else None
    stop_ids = _field(body, "stop_token_ids", (list,), [])
    if not _is_ids(stop_ids):
        raise RequestError(f"stop_token_ids is {stop_ids!r}, expected token ids", param="stop_token_ids")
    try:
        sampling = Sampling(
            temperature=float(_field(body, "temperature", number, 1.0)),
            top_k=max(_field(body, "top_k", (int,), 0), 0),  # vLLM's -1 is 0 here
            top_p=float(_field(body, "top_p", number, 1.0)),
            min_p=float(_field(body, "min_p", number, 0.0)),
            max_tokens=_field(body, "max_tokens", (int,), default_tokens) if tokens is None else tokens,
            stop=_strings(body, "stop"),
            stop_ids=tuple(stop_ids),
            ignore_eos=_field(body, "ignore_eos", (bool,), False),
            n=_field(body, "n", (int,), 1),
            top_logprobs=top,
        )
    except SamplingError as error:
        raise RequestError(str(error), param=str(error).split()[0]) from error
    options = _field(body, "stream_options", (dict,), {})
    seed = _field(body, "seed", (int,), None)
    return _Request(
        chat=chat,
        prompts=prompts,
        sampling=sampling,
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stream=_field(body, "stream", (bool,), False),
        usage=bool(options.get("include_usage")),
        logprobs=logprobs,
    )


def _chat_prompt(body: Mapping[str, Any], tokenizer: ChatTokenizer) -> list[int]:
    messages = _field(body, "messages", (list,), None)
    if not messages:
        raise RequestError("messages is missing or empty; give at least one message", param="messages")
    flat = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f"messages[{index}] needs a role and a content", param="messages")
        content = message.get("content")
        if isinstance(content, list):  # content parts
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(content):
                raise RequestError(f"messages[{index}] holds a part that is not text", param="messages")
            content = "".join(texts)
        if not isinstance(content, str):
            raise RequestError(f"the content of messages[{index}] is not text", param="messages")
        flat.append({**message, "content": content})
    try:
        return tokenizer.encode_chat(flat, add_generation_prompt=True)
    except ValueError as error:
        raise RequestError(str(error), param="messages") from error


def _text_prompts(body: Mapping[str, Any], tokenizer: ChatTokenizer) -> list[list[int]]:
    prompt = _field(body, "prompt", (str, list), None)
    if not prompt:
        raise RequestError("prompt is missing or empty", param="prompt")
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if _is_ids(prompt):
        return [prompt]
    if not all(isinstance(one, str) or _is_ids(one) for one in prompt):
        raise RequestError("prompt must be text, token ids, or a list of these", param="prompt")
    return [tokenizer.encode(one) if isinstance(one, str) else one for one in prompt]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


# --- Answers ----------------------------------------------------------------------------------------------------------

_FINISH = {"stop": "stop", "length": "length", "cancelled": "stop"}


class _Answer:
    """Turns events of one request into the objects of OpenAI's protocol."""

    def __init__(self, request: _Request, model: str, tokenizer: ChatTokenizer):
        self._request = request
        self._tokenizer = tokenizer
        chat = request.chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._kind = "chat.completion" if chat else "text_completion"

    def _token(self, token: int) -> str:
        return self._tokenizer.decode([token])

    def _logprobs(
        self, tokens: Sequence[int], values: Sequence[float], tops: Sequence[Sequence[tuple[int, float]]], offset: int
    ) -> dict[str, Any] | None:
        if not self._request.logprobs:
            return None
        texts = [self._token(token) for token in tokens]
        tops = tops or [()] * len(tokens)
        if self._request.chat:

            def entry(text: str, value: float) -> dict[str, Any]:
                return {"token": text, "logprob": value, "bytes": list(text.encode())}

            return {
                "content": [
                    {**entry(text, value), "top_logprobs": [entry(self._token(t), v) for t, v in top]}
                    for text, value, top in zip(texts, values, tops, strict=True)
                ],
                "refusal": None,
            }
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": list(values),
            "top_logprobs": [{self._token(t): v for t, v in top} for top in tops] if any(tops) else None,
            "text_offset": offsets,
        }

    def usage(self, prompts: int, completions: int) -> dict[str, int]:
        return {
            "prompt_tokens": prompts,
            "completion_tokens": completions,
            "total_tokens": prompts + completions,
        }

    def whole(self, done: list[Completion]) -> dict[str, Any]:
        """The answer without streaming, from completions in the order of their indices."""
        choices = []
        for index, completion in enumerate(done):
            tops = []
            if completion.top is not None:
                ids, values = (part.tolist() for part in completion.top)
                tops = [list(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
            text = completion.text or ""
            choice: dict[str, Any] = {
                "index": index,
                "finish_reason": _FINISH[completion.finish],
                "logprobs": self._logprobs(completion.tokens.tolist(), completion.logprobs.tolist(), tops, 0),
            }
            if self._request.chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                choice["text"] = text
            choices.append(choice)
        used = self.usage(sum(map(len, self._request.prompts)), sum(len(c.tokens) for c in done))
        return {**self._head, "object": self._kind, "choices": choices, "usage": used}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.chat else self._kind
        body = {**self._head, "object": kind, "choices": choices}
        return {**body, "usage": usage} if self._request.usage else body

    def start(self, index: int) -> dict[str, Any]:
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self.chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, index: int, event: Event, offset: int) -> list[dict[str, Any]]:
        """The chunks of one event."""
        chunks = []
        logprobs = self._logprobs(event.tokens, event.logprobs, event.top, offset)

        def choice(text: str | None, logprobs: Any, finish: str | None) -> dict[str, Any]:
            if self._request.chat:
                delta = {} if text is None else {"content": text}
                return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            return {"index": index, "text": text or "", "logprobs": logprobs, "finish_reason": finish}

        if event.text or (logprobs is not None and event.tokens):
            chunks.append(self.chunk([choice(event.text, logprobs, None)]))
        if event.completion is not None:
            chunks.append(self.chunk([choice(None, None, _FINISH[event.completion.finish])]))
        return chunks


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Server(http.server.ThreadingHTTPServer):
    """Serves one engine.

    Args:
        engine: made with `tokenizer`; belongs to the server from now on.
        name: of the model, as clients see it.
        host, port: where to listen; port 0 takes a free one (`server_address`).
        default_tokens: `max_tokens` of requests that do not say; None: as many as there is room for.

    `serve_forever` runs it; `close` ends it when what is under way is answered.
    """

    # Idle connections must not hold the process: `close` waits for the requests under way, not for the threads.
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        engine: Engine,
        tokenizer: ChatTokenizer,
        *,
        name: str,
        host: str = "127.0.0.1",
        port: int = 8000,
        default_tokens: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.name = name
        self.default_tokens = default_tokens
        self.started = int(time.time())
        self._active = 0
        self._changed = threading.Condition()
        super().__init__((host, port), _Handler)  # a port that is taken raises before the thread starts
        self.worker = Worker(engine)

    def close(self) -> None:
        """Stops listening, answers what is under way, stops the engine. Not from the thread of `serve_forever`."""
        self.shutdown()
        self.worker.close()
        with self._changed:
            self._changed.wait_for(lambda: self._active == 0, timeout=_CLOSE_SECONDS)
        self.server_close()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Around a request, which `close` then waits for."""
        with self._changed:
            self._active += 1
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._changed.notify_all()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds of an idle connection
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent; a proxy logs better."""

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": [self._model()]})
        elif self.path == f"/v1/models/{self.server.name}":
            self._json(200, self._model())
        elif self.path == "/health":
            self._json(200, {"status": "ok"})
        else:
            self._error(RequestError(f"no such path: GET {self.path}", status=404))

    def _model(self) -> dict[str, Any]:
        return {"id": self.server.name, "object": "model", "created": self.server.started, "owned_by": "earthmoe"}

    def do_POST(self) -> None:
        with self.server.active():
            try:
                self._post()
            except RequestError as error:
                self._error(error)
            except PromptError as error:
                param = "messages" if self.path.endswith("chat/completions") else "prompt"
                self._error(RequestError(str(error), param=param))
            except DecodeError as error:
                self._error(RequestError(str(error)))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

    def _post(self) -> None:
        body = self._body()
        if self.path not in ("/v1/chat/completions", "/v1/completions"):
            raise RequestError(f"no such path: POST {self.path}", status=404)
        chat = self.path == "/v1/chat/completions"
        request = _parse(body, chat, self.server.tokenizer, self.server.default_tokens)
        model, name = body.get("model"), self.server.name
        if model not in (None, name):
            message = f"the model {model!r} does not exist; this server has {name!r}"
            raise RequestError(message, status=404, param="model")
        self._complete(request)

    def _body(self) -> Any:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            self.close_connection = True
            raise RequestError("a request needs a Content-Length", status=411)
        if int(length) > _LARGEST_BODY:
            self.close_connection = True
            raise RequestError(f"the body has {length} bytes, at most {_LARGEST_BODY} are taken", status=413)
        raw = self.rfile.read(int(length))
        try:
            return json.loads(raw)
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {error}") from error

    def _complete(self, request: _Request) -> None:
        worker = self.server.worker
        answer = _Answer(request, self.server.name, self.server.tokenizer)
        events: Events = queue.Queue()
        first: dict[int, int] = {}  # index of a prompt's first choice
        try:
            for index, prompt in enumerate(request.prompts):
                number = worker.submit(prompt, request.sampling, seed=request.seed, key=index, events=events)
                first[number] = index * request.sampling.n
            stream = _choices(events, request.sampling.n, first)
            if request.stream:
                self._stream(answer, request, stream)
            else:
                done = {index: event.completion for index, event in stream if event.completion is not None}
                self._json(200, answer.whole([done[index] for index in sorted(done)]))
        finally:
            for number in first:  # also finished ones: the worker forgets their queue
                worker.cancel(number)

    def _stream(self, answer: _Answer, request: _Request, stream: Iterator[tuple[int, Event]]) -> None:
        total = len(request.prompts) * request.sampling.n
        tokens, offsets, begun = 0, [0] * total, False
        try:
            for index, event in stream:
                if not begun:  # errors before the first event still get their own status
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.send_header("Cache-Control", "no-cache")
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    begun = True
                    for number in range(total if request.chat else 0):
                        self._event(answer.start(number))
                tokens += len(event.tokens)
                for chunk in answer.piece(index, event, offsets[index]):
                    self._event(chunk)
                offsets[index] += len(event.text)
        except RequestError as error:
            if not begun:
                raise
            self._event(error.body())
        if request.usage:
            self._event(answer.chunk([], answer.usage(sum(map(len, request.prompts)), tokens)))
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, body: Mapping[str, Any]) -> None:
        self._chunk(b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _json(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _error(self, error: RequestError) -> None:
        try:
            self._json(error.status, error.body())
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


def _choices(events: Events, samples: int, first: Mapping[int, int]) -> Iterator[tuple[int, Event]]:
    """(index of the choice, event) of a request, until every sample is finished.

    Raises:
        RequestError: 500 where a sample failed.
    """
    left = samples * len(first)
    while left:
        event = events.get()
        if isinstance(event, Exception):
            raise RequestError(f"the engine failed: {event}", status=500) from event
        if event.completion is not None:
            left -= 1
            if event.completion.error is not None:
                raise RequestError(str(event.completion.error), status=500)
        yield first[event.request] + event.sample, event


def load(path: str | os.PathLike[str], *, dtype: Any = None) -> tuple[Any, Any, Any]:
    """(params, cfg, tokenizer) of a GGUF file or of a Hugging Face directory."""
    path = pathlib.Path(path)
    if path.is_dir():
        from moe.models import hf, tokenizer

        return *hf.load(path, dtype=dtype), tokenizer.from_directory(path)
    from moe.models import gguf  # its package is an extra

    return gguf.load(path, dtype=dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m moe.models.server`."""
    parser = argparse.ArgumentParser(description="Serve a model under OpenAI's protocol.")
    parser.add_argument("--model", required=True, help="a Hugging Face directory or a GGUF file")
    parser.add_argument("--name", help="of the model, as clients see it; default: that of the file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sequences", type=int, default=8, help="that decode side by side")
    parser.add_argument("--length", type=int, default=4096, help="tokens that a sequence may hold")
    parser.add_argument("--dtype", help="of the parameters, e.g. bfloat16; default: as stored")
    options = parser.parse_args(arguments)
    dtype = None if options.dtype is None else jnp.dtype(options.dtype)
    params, cfg, tokenizer = load(options.model, dtype=dtype)
    length = min(options.length, cfg.max_positions or options.length)
    engine = Engine(params, cfg, EngineConfig(sequences=options.sequences, length=length), tokenizer=tokenizer)
    name = options.name or pathlib.Path(options.model).stem
    server = Server(engine, tokenizer, name=name, host=options.host, port=options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"{name} on http://{options.host}:{server.server_address[1]}/v1", flush=True)
    server.serve_forever()
    server.close()


if __name__ == "__main__":
    main()
