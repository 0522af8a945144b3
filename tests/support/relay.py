"""A long cable: ``python relay.py SECONDS`` passes every frame on between the devices r1 and r2 after a delay.

In place of the kernel's netem, which not every kernel has. Alone in its namespace; imports nothing of ours.
"""

from __future__ import annotations

import heapq
import itertools
import select
import socket
import sys
import time

ALL_PROTOCOLS = 3  # ETH_P_ALL of linux/if_ether.h
SOL_PACKET, PACKET_VNET_HDR = 263, 15  # linux/if_packet.h: frames come and go with what is left for the device to do
PACKET_OUTGOING = 4
LONGEST = 10 + 14 + 65536  # bytes: that header, Ethernet's, and a segment that is not cut up yet


def open_device(name: str) -> socket.socket:
    device = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    device.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    device.bind((name, 0))
    device.setblocking(False)
    return device


def main() -> None:
    delay = float(sys.argv[1])
    first, second = open_device("r1"), open_device("r2")
    other_end = {first: second, second: first}
    under_way: list[tuple[float, int, socket.socket, bytes]] = []
    numbers = itertools.count()  # frames of the same moment keep their order
    while True:
        wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for device in select.select([first, second], [], [], wait)[0]:
            frame, address = device.recvfrom(LONGEST)
            if address[2] != PACKET_OUTGOING:
                heapq.heappush(under_way, (time.monotonic() + delay, next(numbers), other_end[device], frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, device, frame = heapq.heappop(under_way)
            device.send(frame)


if __name__ == "__main__":
    main()
