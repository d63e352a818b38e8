#!/usr/bin/env python3
"""What idle nodes of a mesh send.

    tests/cluster/idle_bench.py VINE [NODES [SECONDS [VINE ...]]]

Nodes without models on the loopback of a network namespace of their own, which nftables counts for each node's
port: bytes with the headers of IPv4 and UDP. What their data planes say of themselves (`/metrics`) is
printed beside it, without connections that ended before they were admitted; the rest is the overlay's. Several programs are
measured one after the other. Needs root, iproute2 and nftables.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import nodes

HEADERS_BYTES = 28
SETTLE_S = 40
PORT = 9100


def run(*command, stdin=None, check=True):
    return subprocess.run(command, input=stdin, text=True, capture_output=True, check=check).stdout


def sent(space, count):
    """Packets and bytes that each port has sent."""
    told = json.loads(run("ip", "netns", "exec", space, "nft", "-j", "list", "counters"))
    counters = {c["counter"]["name"]: c["counter"] for c in told["nftables"] if "counter" in c}
    return [(counters[f"n{i}"]["packets"], counters[f"n{i}"]["bytes"]) for i in range(count)]


def data_plane(node):
    """What a node says that its data plane has sent; zero if it says nothing of that."""
    out = [line for line in node.get("/metrics").splitlines() if 'direction="out"' in line]
    value = lambda name: sum(float(line.split()[-1]) for line in out if line.startswith(name))
    return value("grapevine_mesh_udp_packets_total"), value("grapevine_mesh_udp_bytes_total")


def measure(vine, count, seconds):
    space = f"gi{os.getpid() % 10000}"
    root = tempfile.mkdtemp(prefix="grapevine-idle-")
    mesh = []
    run("ip", "netns", "add", space)
    try:
        run("ip", "netns", "exec", space, "ip", "link", "set", "lo", "up")
        rules = "".join(f"counter n{i} {{}}\n" for i in range(count))
        rules += "chain out { type filter hook output priority 0;\n"
        rules += "".join(f"udp sport {PORT + i} counter name n{i}\n" for i in range(count)) + "}\n"
        run("ip", "netns", "exec", space, "nft", "-f", "-", stdin=f"table ip count {{ {rules} }}")
        mesh = [nodes.Node(vine, root, f"n{i}", port=PORT + i, netns=space) for i in range(count)]
        token = mesh[0].start().invite("--uses", str(count))
        for node in mesh[1:]:
            node.start(token)
        nodes.until(f"{count} nodes see each other", 60, lambda: all(node.sees(count) for node in mesh))
        time.sleep(SETTLE_S)
        planes_before, before = [data_plane(node) for node in mesh], sent(space, count)
        time.sleep(seconds)
        after, planes_after = sent(space, count), [data_plane(node) for node in mesh]
    finally:
        for node in mesh:
            node.kill()
        run("ip", "netns", "del", space, check=False)
        shutil.rmtree(root, ignore_errors=True)
    rates = [(b[1] - a[1]) / seconds for a, b in zip(before, after)]
    packets = [(b[0] - a[0]) / seconds for a, b in zip(before, after)]
    of_plane = [(b[1] - a[1] + HEADERS_BYTES * (b[0] - a[0])) / seconds for a, b in zip(planes_before, planes_after)]
    plane_packets = [(b[0] - a[0]) / seconds for a, b in zip(planes_before, planes_after)]
    for what, values, count_of in (("sent", rates, packets), ("data plane", of_plane, plane_packets)):
        print(f"{what:>12}: mean {statistics.mean(values):.0f} B/s, {min(values):.0f} to {max(values):.0f}; "
              f"{statistics.mean(count_of):.2f} packets/s", flush=True)


def main():
    vines = [sys.argv[1], *sys.argv[4:]]
    count, seconds = int((sys.argv[2:] or [8])[0]), int((sys.argv[3:] or [60])[0])
    for vine in vines:
        print(vine, flush=True)
        measure(vine, count, seconds)
    sys.exit(1 if nodes.failures else 0)


if __name__ == "__main__":
    main()
