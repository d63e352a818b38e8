#!/usr/bin/env python3
"""What a hand-off costs: `tests/cluster/handoff_bench.py VINE MODEL.gguf [QUIC_GOODPUT] [ROUNDS] [TOKENS]`.

One node alone, and a mesh of one that prefills and one that decodes, a thread each, on loopback. In turns:
the time to the first token of a new prompt at the node alone, and at the decoder, whose prompt the prefiller computes; then the
same prompt at the decoder once more, started anew, which fetches what the prefiller has cached; and raw streams of quinn, of as many bytes and of 256 MiB (`cargo build --release
-p grapevine-node --example quic_goodput`). Measures, asserts nothing but that hand-offs took place.
"""

import http.client
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from handoffs import WORDS, counter
from nodes import Node, failures, say, until, wait


def first_token(node: Node, model: str, prompt: str) -> tuple[float, int, int]:
    """Seconds until the first token; prompt tokens, and those of them that were not computed here."""
    connection = http.client.HTTPConnection(*node.api, timeout=300)
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    connection.connect()
    began = time.monotonic()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    took = time.monotonic() - began
    connection.close()
    usage = answer["usage"]
    return took, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def goodput(raw: str, size: float) -> float:
    """MB/s of a raw stream of about so many bytes, the median of five on one connection."""
    out = subprocess.run([raw, str(round(size / (1 << 20)))], capture_output=True, text=True, timeout=120).stdout
    return statistics.median(float(x) for x in re.findall(r"([\d.]+) MB/s", out))


def main() -> int:
    vine, model, raw, rounds, tokens = (sys.argv[1:] + [None] * 5)[:5]
    rounds, tokens = int(rounds or 5), int(tokens or 2000)
    name = os.path.splitext(os.path.basename(model))[0]
    root = tempfile.mkdtemp(prefix="vine-bench-")
    common = ["--kv-memory", "1GiB"]
    alone = Node(os.path.abspath(vine), root, "alone", model=model, options=common)
    node = lambda n, role: Node(os.path.abspath(vine), root, n, model=model, options=[*common, "--role", role, "--disagg", "always"])
    p, d = node("p", "prefill"), node("d", "decode")
    nodes = [alone, p, d]
    try:
        alone.start()
        p.start()
        d.start(p.invite())
        ready = lambda n: sum(any(m["state"] == "ready" for m in peer["models"] or []) for peer in n.peers()) == 2
        until("the replicas are known", 60, lambda: ready(d))
        local, remote, fetched, rates, raws, longs = [], [], [], [], [], []
        for round_ in range(rounds + 1):
            drawn = random.Random(round_)
            # These words are 1.75 tokens each in a vocabulary that was not made for English.
            prompt = f"{round_} " + " ".join(drawn.choice(WORDS) for _ in range(tokens * 4 // 7))
            a, n, _ = first_token(alone, name, prompt)
            handed = counter(d, 'grapevine_kv_hand_offs_total{outcome="complete"}')
            b, _, _ = first_token(d, name, prompt)
            handed = counter(d, 'grapevine_kv_hand_offs_total{outcome="complete"}') - handed
            d.kill()
            d.start()
            wait(60, lambda: ready(d))
            # The first bytes of a connection are slow: some other prompt goes before.
            first_token(d, name, f"{round_} before: " + prompt[:2000])
            read = lambda: [counter(d, "grapevine_kv_bytes_total{direction=\"in\"}"), counter(d, "grapevine_kv_hand_off_seconds_total")]
            before = read()
            c, _, again = first_token(d, name, prompt)
            size, seconds = (after - b4 for after, b4 in zip(read(), before))
            if not handed or not again or not seconds:
                say(f"no hand-off in round {round_}: {handed:.0f}, {again} tokens fetched")
                failures.append("hand-off")
                continue
            # The first round warms up.
            if round_:
                local.append(a), remote.append(b), fetched.append(c), rates.append(size / seconds / 1e6)
                if raw:
                    raws.append(goodput(raw, size)), longs.append(goodput(raw, 256 << 20))
            say(f"{n} tokens, {size / 1e6:.1f} MB: alone {a * 1e3:.0f} ms, computed elsewhere {b * 1e3:.0f} ms ({b / a:.3f}), fetched {c * 1e3:.0f} ms "
                f"at {size / seconds / 1e6:.0f} MB/s" + (f", one raw stream {raws[-1]:.0f} MB/s, of 256 MiB {longs[-1]:.0f}" if raws else ""))
        median = statistics.median
        say(f"medians: alone {median(local) * 1e3:.0f} ms, elsewhere {median(remote) * 1e3:.0f} ms, ratio {median(r / l for r, l in zip(remote, local)):.3f}; "
            f"fetched {median(fetched) * 1e3:.0f} ms, {median(rates):.0f} MB/s"
            + (f", raw {median(raws):.0f} MB/s, ratio {median(r / w for r, w in zip(rates, raws)):.2f}; "
               f"raw of 256 MiB {median(longs):.0f} MB/s, ratio {median(r / w for r, w in zip(rates, longs)):.2f}" if raws else ""))
    finally:
        for n in nodes:
            n.kill()
        shutil.rmtree(root)
    return 1 if failures else 0


sys.exit(main())
