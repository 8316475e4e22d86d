"""Relay packets between two network namespaces, late and with losses: relay.py PID PID NAME DELAY LOSS.

In the first process's namespace the relay's end is the interface eth0, in the second's NAME. Packets are delayed by
DELAY seconds, and a share of LOSS is dropped in each direction, drawn with a fixed seed. It ends with its input.
"""

import ctypes
import fcntl
import os
import random
import select
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000


def open_tap(pid: int, name: str) -> int:
    """Make an interface in the network namespace of a process; return the file of its packets."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
    if libc.setns(namespace, 0):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(namespace)
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return tap


def main() -> None:
    near, far = open_tap(int(sys.argv[1]), "eth0"), open_tap(int(sys.argv[2]), sys.argv[3])
    delay, loss = float(sys.argv[4]), float(sys.argv[5])
    print("ready", flush=True)
    draw = random.Random(0)
    # packets in the order of their times, each with the end that it leaves by
    waiting: deque[tuple[float, int, bytes]] = deque()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([near, far, 0], [], [], pause)
        if 0 in ready:
            return
        for end in ready:
            packet = os.read(end, 65536)
            if draw.random() >= loss:
                waiting.append((time.monotonic() + delay, far if end == near else near, packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, end, packet = waiting.popleft()
            try:
                os.write(end, packet)
            except OSError:
                # the interface is down
                continue


if __name__ == "__main__":
    main()
