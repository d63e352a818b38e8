"""What one tenant can learn of another's prompts from the time of an answer and from `cached_tokens`: nothing.

Tenant `ann` has a prompt cached on every node. Tenant `bob` asks for the same prompt, and for prompts that nobody has asked for, in turns.
If `bob` were faster with the first kind, a rank test would tell; `ann` herself is, which shows that the test can see it.
"""

import http.client
import json
import math
import os
import random
import time

from nodes import Node, check, say
from handoffs import WORDS

PROMPT_WORDS = 250
ROUNDS = 60
KEYS = {"ann": "ann-0123456789abcdef0123456789abcdef", "bob": "bob-0123456789abcdef0123456789abcdef"}


def keys_file(root: str) -> str:
    path = os.path.join(root, "keys")
    with open(path, "w") as file:
        file.writelines(f"{name}:{key}:{name}\n" for name, key in KEYS.items())
    return path


def prompt_of(seed: str) -> str:
    drawn = random.Random(seed)
    return f"{seed}: " + " ".join(drawn.choice(WORDS) for _ in range(PROMPT_WORDS))


def ask(node: Node, tenant: str, prompt: str, extra: dict | None = None) -> tuple[float, int]:
    """Seconds until the first token, and `cached_tokens`."""
    connection = http.client.HTTPConnection(*node.api, timeout=60)
    body = {"model": "demo", "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True} | (extra or {})
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEYS[tenant]}"}
    try:
        connection.connect()
        began = time.monotonic()
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        took = time.monotonic() - began
    finally:
        connection.close()
    if response.status != 200:
        raise ValueError(answer)
    return took, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def differ(one: list[float], other: list[float]) -> float:
    """The two-sided p-value of the Mann-Whitney U test that two samples come from one distribution (normal approximation)."""
    ranked = sorted([(value, 0) for value in one] + [(value, 1) for value in other])
    ranks = sum(rank for rank, (_, whose) in enumerate(ranked, 1) if whose == 0)
    n, m = len(one), len(other)
    u = ranks - n * (n + 1) / 2
    deviation = math.sqrt(n * m * (n + m + 1) / 12)
    return math.erfc(abs(u - n * m / 2) / deviation / math.sqrt(2))


def tenants_apart(nodes: list[Node]) -> None:
    """`nodes`: one that prefills, and two that are asked."""
    asked = nodes[1:]
    shared = [prompt_of(f"shared {k}") for k in range(ROUNDS)]
    for prompt in shared:
        for node in asked:
            ask(node, "ann", prompt)
    known, unknown, own, cached = [], [], [], []
    order = list(range(ROUNDS))
    random.Random(5).shuffle(order)
    for place, k in enumerate(order):
        node = asked[place % len(asked)]
        fresh = prompt_of(f"fresh {k}")
        pair = [("known", shared[k]), ("unknown", fresh)]
        for kind, prompt in pair if place % 2 else reversed(pair):
            took, tokens = ask(node, "bob", prompt)
            (known if kind == "known" else unknown).append(took)
            cached.append(tokens)
        own.append(ask(node, "ann", shared[k])[0])
    median = lambda values: sorted(values)[len(values) // 2] * 1000
    say(f"median time to the first token: ann's prompts asked by bob {median(known):.1f} ms, nobody's {median(unknown):.1f} ms, "
        f"ann's asked by ann {median(own):.1f} ms")
    check("cached_tokens tell bob nothing", not any(cached), sorted(set(cached)))
    check("ann is faster with her own prompts: the test can see a cached prompt", (p := differ(own, unknown)) < 1e-6, f"p = {p:.1e}")
    check("bob is as fast with ann's prompts as with nobody's", (p := differ(known, unknown)) > 0.001, f"p = {p:.3f}")
    # A client that names a salt, or another tenant, gets neither.
    other = prompt_of("only ann's")
    ask(asked[0], "ann", other)
    named = {field: "ann" for field in ("cache_salt", "salt", "tenant", "user")}
    _, tokens = ask(asked[0], "bob", other, named)
    check("a salt or a tenant named in the request changes nothing", tokens == 0, tokens)
