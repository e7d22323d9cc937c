"""Which addresses processes listen on, as Linux tells it."""

import os
from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv6Address, ip_address
from pathlib import Path

LISTEN = "0A"


def listening(processes: Iterable[int]) -> dict[str, list[int]]:
    """The addresses on which these processes listen, with those that do; of processes that have ended, none."""
    found: dict[str, list[int]] = {}
    for process in processes:
        proc = Path("/proc") / str(process)
        try:
            handles = set()
            for handle in (proc / "fd").iterdir():
                with suppress(FileNotFoundError):  # closed since: the folder's own handle, for instance
                    handles.add(os.readlink(handle))
            rows = [row for name in ("tcp", "tcp6") for row in (proc / "net" / name).read_text().splitlines()[1:]]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, _, _, _, _, _, inode, *_ = row.split()
            if state == LISTEN and f"socket:[{inode}]" in handles:
                found.setdefault(_address(local.partition(":")[0]), []).append(process)
    return found


def elsewhere(processes: Iterable[int]) -> dict[str, list[int]]:
    """Of these addresses, those that other machines may reach."""
    return {address: who for address, who in listening(processes).items() if not ip_address(address).is_loopback}


def family(process: int) -> set[int]:
    """A process and all that it has started, and those have."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, new = set(), {process}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found


def _address(hexadecimal: str) -> str:
    """Words of four bytes, each in the machine's order."""
    words = [bytes.fromhex(hexadecimal[at : at + 8])[::-1] for at in range(0, len(hexadecimal), 8)]
    ip = ip_address(b"".join(words))
    return str(ip.ipv4_mapped or ip) if isinstance(ip, IPv6Address) else str(ip)
