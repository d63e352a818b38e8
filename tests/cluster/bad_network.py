"""Hosts on one machine and a network between them that loses, delays, throttles and cuts.

Each host is a network namespace with a TUN device; its packets pass through this process, which does with
them what a bad network does. Works on kernels without netem. Needs root, iproute2 and /dev/net/tun.
"""

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time

from nodes import in_netns


def missing() -> str | None:
    """What this machine lacks for it."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs iproute2"
    return None if os.path.exists("/dev/net/tun") else "needs /dev/net/tun"


class Network:
    """A network of `hosts`, at 10.77.0.1 and so on. Ends with `close`."""

    def __init__(self, hosts: list[str], seed: int):
        self.loss, self.delay_s = 0.0, 0.0
        # Of what each host sends; None: as fast as this process is.
        self.bytes_per_s: float | None = None
        self.sent_until = dict.fromkeys(hosts, 0.0)
        self.passed = self.lost = self.overflowed = 0
        self.random, self.cuts = random.Random(seed), set()
        self.address = {host: f"10.77.0.{k}" for k, host in enumerate(hosts, 1)}
        self.host_of = {f"10.77.0.{k}": host for k, host in enumerate(hosts, 1)}
        self.netns = {host: f"vine{os.getpid()}-{host}" for host in hosts}
        self.device, self.held, self.ended = {}, [], False
        try:
            for host in hosts:
                self.device[host] = self.make(host)
        except BaseException:
            self.remove()
            raise
        self.thread = threading.Thread(target=self.forward, daemon=True)
        self.thread.start()

    def make(self, host: str) -> int:
        name = self.netns[host]
        ip("netns", "add", name)
        with in_netns(name):
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            tunsetiff, iff_tun, iff_no_pi = 0x400454CA, 1, 0x1000
            fcntl.ioctl(device, tunsetiff, struct.pack("16sH22x", b"wire", iff_tun | iff_no_pi))
        ip("-n", name, "address", "add", f"{self.address[host]}/24", "dev", "wire")
        # Who sends finds room while this process is busy.
        ip("-n", name, "link", "set", "wire", "txqueuelen", "20000")
        ip("-n", name, "link", "set", "wire", "up")
        ip("-n", name, "link", "set", "lo", "up")
        return device

    def part(self, *sides: list[str]) -> None:
        """Only hosts of one side reach each other."""
        pairs = [(a, b) for a in self.address for b in self.address]
        together = {(a, b) for side in sides for a in side for b in side}
        self.cuts = set(pairs) - together

    def heal(self) -> None:
        self.loss, self.delay_s, self.bytes_per_s, self.cuts = 0.0, 0.0, None, set()

    def forward(self) -> None:
        poll, host_at = select.poll(), {}
        for host, device in self.device.items():
            poll.register(device, select.POLLIN)
            host_at[device] = host
        while not self.ended:
            now = time.monotonic()
            while self.held and self.held[0][0] <= now:
                _, _, to, packet = heapq.heappop(self.held)
                self.deliver(to, packet)
            wait_ms = 50 if not self.held else min(50, max(0, (self.held[0][0] - now) * 1000))
            for device, _ in poll.poll(wait_ms):
                self.take(host_at[device], device)

    def take(self, host: str, device: int) -> None:
        for _ in range(64):
            try:
                packet = os.read(device, 65536)
            except BlockingIOError:
                return
            # IPv4 only: the destination is at bytes 16 to 19.
            to = self.host_of.get(".".join(map(str, packet[16:20]))) if packet[0] >> 4 == 4 else None
            if to is None:
                continue
            if (host, to) in self.cuts or self.random.random() < self.loss:
                self.lost += 1
            elif len(self.held) >= HELD_MAX:
                self.overflowed += 1
            else:
                self.passed += 1
                due = self.leaves(host, len(packet)) + self.delay_s
                heapq.heappush(self.held, (due, self.passed, to, packet))

    def leaves(self, host: str, size: int) -> float:
        """When a packet of this size has left, after those before it."""
        now = time.monotonic()
        if self.bytes_per_s:
            now = self.sent_until[host] = max(now, self.sent_until[host]) + size / self.bytes_per_s
        return now

    def deliver(self, to: str, packet: bytes) -> None:
        try:
            os.write(self.device[to], packet)
        except OSError:
            # The device's queue is full.
            self.overflowed += 1

    def close(self) -> None:
        self.ended = True
        self.thread.join(timeout=10)
        self.remove()

    def remove(self) -> None:
        for device in self.device.values():
            os.close(device)
        for name in self.netns.values():
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def ip(*args: str) -> None:
    done = subprocess.run(["ip", *args], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(args)}: {done.stderr.strip()}")


# Packets on their way; more are dropped, as a router's queue would.
HELD_MAX = 20_000
