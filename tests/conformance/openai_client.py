#!/usr/bin/env python3
"""Conformance: the official `openai` Python client against a running node.

    openai_client.py BASE_URL MODEL [--key KEY] [--only NAME]

BASE_URL without /v1, for example http://127.0.0.1:8420. Prints a table and `N passed, N failed`;
exits 1 if anything failed. Checks shapes and rules, not how clever the model is.
"""

import argparse
import base64
import json
import math
import struct
import sys
import threading
import time
import traceback
import urllib.error
import urllib.request

import openai

CASES = []


def case(function):
    CASES.append(function)
    return function


class Ctx:
    def __init__(self, url, model, key):
        self.url = url.rstrip("/")
        self.model = model
        self.key = key
        self.client = openai.OpenAI(
            base_url=self.url + "/v1", api_key=key or "none", max_retries=0, timeout=300
        )

    def chat(self, content="Say hello.", **options):
        options.setdefault("max_tokens", 16)
        options.setdefault("messages", [{"role": "user", "content": content}])
        return self.client.chat.completions.create(model=self.model, **options)

    def complete(self, prompt="The vine grows", **options):
        options.setdefault("max_tokens", 16)
        return self.client.completions.create(model=self.model, prompt=prompt, **options)

    def raw(self, path, body=None, headers=None, method=None):
        """Status, headers and JSON of a plain request."""
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, method=method)
        request.add_header("content-type", "application/json")
        if self.key:
            request.add_header("authorization", f"Bearer {self.key}")
        for name, value in (headers or {}).items():
            request.add_header(name, value)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def metric(self, name, **labels):
        text = self.raw("/metrics")[2].decode()
        total, found = 0.0, False
        for line in text.splitlines():
            if line.startswith("#") or not line.startswith(name):
                continue
            rest = line[len(name):]
            if rest[0] not in "{ ":
                continue
            if all(f'{k}="{v}"' in rest for k, v in labels.items()):
                total += float(rest.rsplit(" ", 1)[1])
                found = True
        assert found, f"metric {name} {labels} is missing"
        return total


def refused(status, param, call, code=None):
    """The call fails with this status and names this field."""
    try:
        call()
    except openai.APIStatusError as error:
        body = error.body or {}
        assert error.status_code == status, f"status {error.status_code}, expected {status}: {body}"
        assert set(body) >= {"message", "type", "param", "code"}, body
        if param is not None:
            assert body["param"] == param, f"param {body['param']!r}, expected {param!r}: {body}"
        if code is not None:
            assert body["code"] == code, f"code {body['code']!r}, expected {code!r}"
        return error
    raise AssertionError("the request was accepted")


@case
def models(c):
    ids = [m.id for m in c.client.models.list().data]
    assert c.model in ids, ids
    one = c.client.models.retrieve(c.model)
    assert one.id == c.model and one.object == "model" and one.created > 1_600_000_000
    refused(404, "model", lambda: c.client.models.retrieve("no-such-model"), "model_not_found")


@case
def chat(c):
    r = c.chat()
    assert r.object == "chat.completion" and r.model == c.model and r.id.startswith("chatcmpl-")
    assert len(r.choices) == 1
    choice = r.choices[0]
    assert choice.index == 0 and choice.message.role == "assistant"
    assert isinstance(choice.message.content, str)
    assert choice.finish_reason in ("stop", "length")
    u = r.usage
    assert u.prompt_tokens > 0 and 0 < u.completion_tokens <= 16
    assert u.total_tokens == u.prompt_tokens + u.completion_tokens
    assert u.prompt_tokens_details.cached_tokens >= 0


@case
def chat_greedy_repeats(c):
    a = c.chat(temperature=0).choices[0].message.content
    b = c.chat(temperature=0).choices[0].message.content
    assert a == b, (a, b)


@case
def chat_seed_repeats(c):
    texts = [c.chat(temperature=1.0, seed=7).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1], texts
    other = {c.chat(temperature=1.5, seed=s).choices[0].message.content for s in range(8)}
    assert len(other) > 1, "eight seeds gave one answer"


@case
def chat_content_parts_and_roles(c):
    r = c.chat(messages=[
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "again"},
    ])
    assert r.choices[0].message.content is not None


@case
def chat_stream(c):
    chunks = list(c.chat(temperature=0, stream=True))
    assert all(k.object == "chat.completion.chunk" for k in chunks)
    assert len({k.id for k in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert all(k.usage is None for k in chunks)
    text = "".join(k.choices[0].delta.content or "" for k in chunks)
    whole = c.chat(temperature=0).choices[0].message.content
    assert text == whole, (text, whole)


@case
def chat_stream_usage(c):
    chunks = list(c.chat(stream=True, stream_options={"include_usage": True}))
    last = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens > 0
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens
    assert all(k.usage is None for k in chunks[:-1])


@case
def chat_n(c):
    r = c.chat(n=3, temperature=1.2)
    assert sorted(x.index for x in r.choices) == [0, 1, 2]
    counts = r.usage.completion_tokens
    assert 3 <= counts <= 48, counts
    chunks = list(c.chat(n=2, stream=True))
    seen = {x.index for k in chunks for x in k.choices}
    assert seen == {0, 1}
    ends = [x.index for k in chunks for x in k.choices if x.finish_reason]
    assert sorted(ends) == [0, 1]


@case
def chat_max_tokens(c):
    r = c.chat(content="Tell a long story.", max_tokens=3, temperature=0)
    assert r.usage.completion_tokens <= 3
    r = c.chat(max_tokens=None, max_completion_tokens=2)
    assert r.usage.completion_tokens <= 2


@case
def chat_logprobs(c):
    r = c.chat(logprobs=True, top_logprobs=3, temperature=0, max_tokens=5)
    tokens = r.choices[0].logprobs.content
    # a token that ends the text is counted, and not shown
    assert 0 <= r.usage.completion_tokens - len(tokens) <= 1
    for t in tokens:
        assert t.logprob <= 1e-4 and len(t.top_logprobs) == 3
        assert t.bytes is None or bytes(t.bytes).decode(errors="replace") == t.token
        best = t.top_logprobs[0].logprob
        assert abs(t.logprob - best) < 1e-4, "greedy takes the best token"
        assert sum(math.exp(x.logprob) for x in t.top_logprobs) <= 1.001
    text = b"".join(bytes(t.bytes) for t in tokens).decode(errors="replace")
    assert text.startswith(r.choices[0].message.content[:1]), (text, r.choices[0].message.content)
    assert c.chat().choices[0].logprobs is None


@case
def chat_logprobs_stream(c):
    chunks = list(c.chat(logprobs=True, temperature=0, max_tokens=6, stream=True))
    streamed = [t.token for k in chunks for x in k.choices if x.logprobs for t in x.logprobs.content]
    whole = c.chat(logprobs=True, temperature=0, max_tokens=6).choices[0].logprobs.content
    assert streamed == [t.token for t in whole], (streamed, whole)


@case
def stop_strings(c):
    # Past the end of the text, so that also a model of few words says enough.
    more = {"extra_body": {"ignore_eos": True}}
    whole = c.complete(**more, temperature=0, max_tokens=24).choices[0].text
    body = whole.strip()
    if len(body) < 6:
        raise AssertionError(f"the model says too little to test: {whole!r}")
    stop = body[2:5]
    r = c.complete(**more, temperature=0, max_tokens=24, stop=[stop, "\u0000never"])
    choice = r.choices[0]
    assert stop not in choice.text, (stop, choice.text)
    assert whole.startswith(choice.text) and choice.finish_reason == "stop"
    streamed = "".join(
        k.choices[0].text for k in c.complete(**more, temperature=0, max_tokens=24, stop=stop, stream=True)
    )
    assert streamed == choice.text, (streamed, choice.text)


@case
def logit_bias(c):
    seen = []
    for token in (70, 71):
        r = c.complete(temperature=0, max_tokens=3, logprobs=0, logit_bias={str(token): 100})
        tokens = r.choices[0].logprobs.tokens
        assert len(tokens) == 3 and len(set(tokens)) == 1, tokens
        seen.append(tokens[0])
    assert seen[0] != seen[1], seen
    refused(400, "logit_bias", lambda: c.complete(logit_bias={"7": 101}))


@case
def penalties_and_truncation(c):
    c.chat(top_p=0.5, presence_penalty=1.5, frequency_penalty=-1.5,
           extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3})


@case
def completions(c):
    r = c.complete()
    assert r.object == "text_completion" and r.id.startswith("cmpl-")
    assert isinstance(r.choices[0].text, str) and r.choices[0].finish_reason in ("stop", "length")
    many = c.complete(prompt=["one", "two"], n=2, max_tokens=2)
    assert [x.index for x in many.choices] == [0, 1, 2, 3]
    tokens = c.complete(prompt=[1, 2, 3], max_tokens=2)
    assert tokens.usage.prompt_tokens == 3
    lists = c.complete(prompt=[[1, 2], [3]], max_tokens=2)
    assert lists.usage.prompt_tokens == 3 and len(lists.choices) == 2
    text = "".join(k.choices[0].text for k in c.complete(temperature=0, stream=True) if k.choices)
    assert text == c.complete(temperature=0).choices[0].text


@case
def completions_echo_logprobs(c):
    prompt = "The vine grows"
    r = c.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=3, temperature=0)
    choice = r.choices[0]
    lp = choice.logprobs
    # some tokenizers write a leading space of their own
    assert choice.text.strip().startswith(prompt), choice.text
    n = len(lp.tokens)
    assert n == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset)
    assert 0 <= r.usage.total_tokens - n <= 1, (n, r.usage)
    assert lp.token_logprobs[0] is None and lp.top_logprobs[0] is None
    assert all(x is not None and x <= 1e-4 for x in lp.token_logprobs[1:])
    assert lp.text_offset == sorted(lp.text_offset)
    scored = c.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=0)
    assert scored.usage.completion_tokens == 0
    for a, b in zip(scored.choices[0].logprobs.token_logprobs[1:], lp.token_logprobs[1:]):
        assert abs(a - b) < 1e-4, (a, b)


@case
def json_object(c):
    r = c.chat(content="Answer in JSON.", response_format={"type": "json_object"},
               max_tokens=200, temperature=0)
    choice = r.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict), choice.message.content
    else:
        assert choice.message.content.lstrip().startswith("{"), choice.message.content


@case
def json_schema(c):
    schema = {
        "type": "object",
        "properties": {
            "colour": {"type": "string", "enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "ok": {"type": "boolean"},
        },
        "required": ["colour", "count", "ok"],
        "additionalProperties": False,
    }
    fmt = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for temperature in (0, 1.0):
        r = c.chat(content="A thing.", response_format=fmt, max_tokens=600, temperature=temperature)
        assert r.choices[0].finish_reason == "stop", r.choices[0]
        value = json.loads(r.choices[0].message.content)
        assert set(value) == {"colour", "count", "ok"}, value
        assert value["colour"] in ("red", "green", "blue") and isinstance(value["ok"], bool)
        assert 0 <= value["count"] <= 99
    text = "".join(k.choices[0].delta.content or "" for k in
                   c.chat(content="A thing.", response_format=fmt, max_tokens=600, stream=True))
    json.loads(text)


@case
def grammar_extension(c):
    r = c.chat(max_tokens=40, extra_body={"grammar": {"type": "regex", "value": "[ab]{3}-[0-9]{2}"}})
    import re
    assert re.fullmatch("[ab]{3}-[0-9]{2}", r.choices[0].message.content), r.choices[0]
    lark = 'start: "yes" | "no"'
    r = c.chat(max_tokens=10, extra_body={"grammar": {"type": "lark", "value": lark}})
    assert r.choices[0].message.content in ("yes", "no"), r.choices[0]
    refused(400, None, lambda: c.chat(extra_body={"grammar": {"type": "regex", "value": "(["}}))


TOOLS = [{
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12},
                           "unit": {"type": "string", "enum": ["c", "f"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}, {
    "type": "function",
    "function": {"name": "get_time", "parameters": {
        "type": "object", "properties": {"zone": {"type": "string", "enum": ["utc", "cet"]}},
        "required": ["zone"], "additionalProperties": False}},
}]


def check_call(call, name=None):
    assert call.type == "function" and call.id
    assert call.function.name in ("get_weather", "get_time")
    if name:
        assert call.function.name == name, call
    arguments = json.loads(call.function.arguments)
    want = {"city", "unit"} if call.function.name == "get_weather" else {"zone"}
    assert set(arguments) == want, arguments


@case
def tools_auto_and_none(c):
    r = c.chat(content="Hello!", tools=TOOLS, tool_choice="auto", max_tokens=12)
    assert r.choices[0].finish_reason in ("stop", "length", "tool_calls")
    r = c.chat(content="Weather?", tools=TOOLS, tool_choice="none", max_tokens=12)
    assert not r.choices[0].message.tool_calls


@case
def tools_required(c):
    r = c.chat(content="What is the weather in Rome?", tools=TOOLS, tool_choice="required",
               max_tokens=200, temperature=0, parallel_tool_calls=False)
    choice = r.choices[0]
    assert choice.finish_reason == "tool_calls", choice
    assert choice.message.content in (None, ""), choice
    assert len(choice.message.tool_calls) == 1
    check_call(choice.message.tool_calls[0])


@case
def tools_named(c):
    for name in ("get_time", "get_weather"):
        named = {"type": "function", "function": {"name": name}}
        r = c.chat(content="Now.", tools=TOOLS, tool_choice=named, max_tokens=200)
        check_call(r.choices[0].message.tool_calls[0], name)


@case
def tools_stream(c):
    named = {"type": "function", "function": {"name": "get_weather"}}
    calls, reason = {}, None
    for k in c.chat(content="Rome?", tools=TOOLS, tool_choice=named, max_tokens=200, temperature=0,
                    stream=True):
        for x in k.choices:
            reason = x.finish_reason or reason
            for t in x.delta.tool_calls or []:
                call = calls.setdefault(t.index, {"id": None, "name": "", "arguments": ""})
                call["id"] = t.id or call["id"]
                call["name"] += t.function.name or ""
                call["arguments"] += t.function.arguments or ""
    assert reason == "tool_calls" and set(calls) == {0}, (reason, calls)
    assert calls[0]["id"] and calls[0]["name"] == "get_weather"
    assert set(json.loads(calls[0]["arguments"])) == {"city", "unit"}


@case
def tools_round_trip(c):
    r = c.chat(max_tokens=8, tools=TOOLS, messages=[
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [{
            "id": "call_1", "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city":"Rome","unit":"c"}'}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny, 30"},
    ])
    assert r.choices


@case
def embeddings(c):
    create = c.client.embeddings.create
    r = create(model=c.model, input=["a vine", "a vine", "a database"], encoding_format="float")
    v = [x.embedding for x in r.data]
    assert [x.index for x in r.data] == [0, 1, 2] and r.usage.prompt_tokens > 0
    assert all(abs(math.fsum(x * x for x in e) - 1) < 1e-3 for e in v)
    assert v[0] == v[1], "equal texts have equal vectors"
    assert v[0] != v[2]
    packed = create(model=c.model, input="a vine", encoding_format="base64").data[0].embedding
    if isinstance(packed, str):
        raw = base64.b64decode(packed)
        packed = struct.unpack(f"<{len(raw) // 4}f", raw)
    assert len(packed) == len(v[0]) and max(abs(a - b) for a, b in zip(packed, v[0])) < 1e-6
    # the client asks for base64 by itself where no format is named
    assert len(create(model=c.model, input=[1, 2, 3]).data[0].embedding) == len(v[0])
    assert len(create(model=c.model, input="x", dimensions=len(v[0])).data) == 1
    refused(400, "dimensions", lambda: create(model=c.model, input="x", dimensions=len(v[0]) + 1))
    refused(400, "input", lambda: create(model=c.model, input=""))
    refused(400, "input", lambda: create(model=c.model, input=[]))


@case
def errors(c):
    rows = [
        ("temperature", dict(temperature=-1)), ("temperature", dict(temperature=2.1)),
        ("top_p", dict(top_p=0)), ("top_p", dict(top_p=1.5)),
        ("n", dict(n=0)), ("max_tokens", dict(max_tokens=0)), ("messages", dict(messages=[])),
        ("top_logprobs", dict(top_logprobs=2)),
        ("top_logprobs", dict(logprobs=True, top_logprobs=21)),
        ("presence_penalty", dict(presence_penalty=3)),
        ("frequency_penalty", dict(frequency_penalty=-3)),
        ("min_p", dict(extra_body={"min_p": 2})),
        ("repetition_penalty", dict(extra_body={"repetition_penalty": 0})),
        ("temperature", dict(extra_body={"temperature": "hot"})),
        ("stream", dict(extra_body={"stream": "yes"})),
        ("stop", dict(stop=["x"] * 17)),
        ("stream_options", dict(stream_options={"include_usage": True})),
        ("tool_choice", dict(extra_body={"tool_choice": "required"})),
        ("response_format.type", dict(extra_body={"response_format": {"type": "xml"}})),
        ("response_format.json_schema", dict(response_format={"type": "json_schema"})),
        ("messages[0].role", dict(messages=[{"role": "king", "content": "x"}])),
        ("messages[0].content", dict(messages=[{"role": "user"}])),
        ("messages[0].content[0].type",
         dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])),
        ("messages[0].tool_call_id", dict(messages=[{"role": "tool", "content": "x"}])),
    ]
    for param, options in rows:
        try:
            refused(400, param, lambda: c.chat(**options))
        except AssertionError as error:
            raise AssertionError(f"{options}: {error}") from None
    refused(400, "suffix", lambda: c.complete(suffix="end"))
    refused(400, "best_of", lambda: c.complete(best_of=3))
    e = refused(404, "model", lambda: c.client.chat.completions.create(
        model="nope", messages=[{"role": "user", "content": "x"}]), "model_not_found")
    assert c.model in e.message, "the error lists what exists"
    assert isinstance(e, openai.NotFoundError)
    refused(400, "messages", lambda: c.chat(content="word " * 400_000), "context_length_exceeded")


@case
def unknown_fields_are_ignored(c):
    c.chat(extra_body={"invented": {"x": 1}}, user="me", seed=1, store=True, metadata={"a": "b"})


@case
def plain_http(c):
    for path, body, status, code in [
        ("/v1/chat/completions", b'{"model": ', 400, "invalid_json"),
        ("/v1/chat/completions", b"[]", 400, "invalid_type"),
        ("/v1/chat/completions", b"{}", 400, "missing_required_parameter"),
        ("/v1/nothing", None, 404, "not_found"),
        ("/v1/chat/completions", None, 405, "method_not_allowed"),
    ]:
        got, headers, text = c.raw(path, body)
        error = json.loads(text)["error"]
        assert (got, error["code"]) == (status, code), (path, body, got, error)
        assert headers["x-request-id"].startswith("req-")
    _, _, text = c.raw("/v1/chat/completions", b'{"model": "x",\n  oops}')
    assert "line 2" in json.loads(text)["error"]["message"]
    got, _, _ = c.raw("/v1/chat/completions", b"{}", {"content-type": "text/plain"})
    assert got == 415, got
    assert c.raw("/healthz")[0] == 200 and c.raw("/readyz")[0] == 200
    document = json.loads(c.raw("/openapi.json")[2])
    assert "/v1/chat/completions" in document["paths"]


@case
def sse_framing(c):
    body = {"model": c.model, "stream": True, "max_tokens": 4,
            "messages": [{"role": "user", "content": "hi"}],
            "stream_options": {"include_usage": True}}
    _, headers, text = c.raw("/v1/chat/completions", body)
    assert headers["content-type"].startswith("text/event-stream")
    request = headers["x-request-id"]
    events = [e for e in text.decode().split("\n\n") if e and not e.startswith(":")]
    assert events[-1].endswith("data: [DONE]")
    last = -1
    for event in events:
        lines = event.split("\n")
        assert lines[0].startswith("id: ") and lines[1].startswith("data: "), event
        rid, index = lines[0][4:].rsplit(":", 1)
        assert rid == request and int(index) >= last, event
        last = int(index)
    for event in events[:-1]:
        json.loads(event.split("\n")[1][6:])


@case
def prefix_cache(c):
    prompt = "Once upon a time there was a vine. " * 24
    c.complete(prompt=prompt, max_tokens=1)
    r = c.complete(prompt=prompt, max_tokens=1)
    cached = r.usage.prompt_tokens_details.cached_tokens
    assert cached > 0 and cached < r.usage.prompt_tokens, r.usage


@case
def cancel_frees_blocks(c):
    def used():
        return c.metric("grapevine_kv_blocks", state="used")

    deadline = time.monotonic() + 60
    while used() > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    start = used()
    stream = c.chat(content="Tell a very long story.", max_tokens=100_000, stream=True,
                    extra_body={"logit_bias": {}})
    for _, _chunk in zip(range(3), stream):
        pass
    stream.close()
    deadline = time.monotonic() + 30
    while used() > start and time.monotonic() < deadline:
        time.sleep(0.05)
    assert used() <= start, (start, used())


@case
def many_at_once(c):
    answers, faults = [], []

    def ask(i):
        try:
            answers.append((i % 4, c.chat(content=f"Count to {i % 4}.", temperature=0).choices[0]
                            .message.content))
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults, faults
    for kind in range(4):
        assert len({text for k, text in answers if k == kind}) == 1, "the batch changes the answer"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--key")
    parser.add_argument("--only")
    options = parser.parse_args()
    ctx = Ctx(options.url, options.model, options.key)
    passed = failed = 0
    for function in CASES:
        if options.only and function.__name__ != options.only:
            continue
        began = time.monotonic()
        try:
            function(ctx)
            passed += 1
            verdict = "ok"
        except Exception as error:
            failed += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            verdict = f"FAILED line {where.lineno}: {type(error).__name__}: {str(error)[:600]}"
        print(f"{function.__name__:32} {time.monotonic() - began:7.2f} s  {verdict}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
