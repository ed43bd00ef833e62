"""The metrics of all replicas on one page of Prometheus: each sample has its replica in the label `engine`."""

from collections.abc import Iterable


def merged(expositions: Iterable[bytes]) -> bytes:
    """Several pages in Prometheus' text format as one, each metric with its head and the samples of all.

    Pages differ in a label. Samples without one, of a process, do not say whose they are, and are left out.
    """
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for page in expositions:
        name = ""
        for line in page.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ")[2]
            if line.startswith("#"):
                head = heads.setdefault(name, [])
                if line not in head:
                    head.append(line)
            elif "{" in line:
                samples.setdefault(name, []).append(line)
    lines = [line for name, found in samples.items() for line in (*heads[name], *found)]
    return "".join(f"{line}\n" for line in lines).encode()
