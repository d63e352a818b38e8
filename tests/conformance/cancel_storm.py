#!/usr/bin/env python3
"""Clients that leave in the middle of a stream: blocks in use must return to where they were.

    cancel_storm.py BASE_URL MODEL [--connects 10000] [--at-once 64] [--key KEY]

Each client asks for a long stream, reads a random number of bytes (perhaps none) and closes its
socket. Half of them reset the connection. Then blocks in use, waiting and running sequences are read
from /metrics until they are what they were at the start; exits 1 if they are not within a minute.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import struct
import sys
import time
import urllib.parse
import urllib.request


def gauges(url, key):
    request = urllib.request.Request(url + "/metrics")
    if key:
        request.add_header("authorization", f"Bearer {key}")
    text = urllib.request.urlopen(request, timeout=60).read().decode()

    def total(name, state):
        lines = re.findall(rf'^{name}\{{[^}}]*state="{state}"[^}}]*\}} (\S+)$', text, re.M)
        if not lines:
            raise SystemExit(f"{name} state={state} is not in /metrics")
        return sum(map(float, lines))

    return {
        "blocks used": total("grapevine_kv_blocks", "used"),
        "running": total("grapevine_sequences", "running"),
        "waiting": total("grapevine_sequences", "waiting"),
    }


async def client(host, port, body, key, rng, counts):
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        counts["refused"] += 1
        return
    try:
        auth = f"authorization: Bearer {key}\r\n" if key else ""
        head = (f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}:{port}\r\n{auth}"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n")
        writer.write(head.encode() + body)
        await writer.drain()
        want = rng.choice([0, 0, 1, 200, 600, 1500])
        got = b""
        while len(got) < want:
            piece = await asyncio.wait_for(reader.read(want - len(got)), 120)
            if not piece:
                break
            got += piece
        status = got[9:12].decode(errors="replace") if len(got) >= 12 else "left"
        counts[status] = counts.get(status, 0) + 1
        if rng.random() < 0.5:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except (OSError, asyncio.TimeoutError) as error:
        counts[type(error).__name__] = counts.get(type(error).__name__, 0) + 1
    finally:
        writer.close()


async def storm(options, counts):
    where = urllib.parse.urlsplit(options.url)
    rng = random.Random(options.seed)
    body = json.dumps({
        "model": options.model, "stream": True, "max_tokens": 2000, "temperature": 1,
        "messages": [{"role": "user", "content": "Tell a long story about a vine."}],
    }).encode()
    left = iter(range(options.connects))

    async def lane():
        for i in left:
            await client(where.hostname, where.port or 80, body, options.key, rng, counts)
            if (i + 1) % 1000 == 0:
                print(f"{i + 1} clients", flush=True)

    await asyncio.gather(*(lane() for _ in range(options.at_once)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--connects", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--key")
    options = parser.parse_args()
    options.url = options.url.rstrip("/")
    start = gauges(options.url, options.key)
    counts = {"refused": 0}
    began = time.monotonic()
    asyncio.run(storm(options, counts))
    took = time.monotonic() - began
    deadline = time.monotonic() + 60
    end = gauges(options.url, options.key)
    while end != start and time.monotonic() < deadline:
        time.sleep(0.1)
        end = gauges(options.url, options.key)
    print(f"{options.connects} clients in {took:.1f} s, by what they saw: {counts}")
    print(f"start {start}\nend   {end}")
    ok = end == start and counts["refused"] == 0
    print("ok" if ok else "FAILED: the node did not return to where it was")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
