"""A seeded mutator of annotation files: bytes, JSON structure, label lines, YAML text."""

from __future__ import annotations

import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    10**6,
    2**63,
    -(2**63) - 1,
    10**400,
    1e308,
    -1e308,
    0.1,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "1",
    "nan",
    "../x.jpg",
    "a\0b",
    "\ud800",
    "ü ß.jpg",
    [],
    {},
    [[]],
    [None],
    [[1, 2, 3]],
    [["x"]],
    {"counts": "abc", "size": [1, 1]},
    {"counts": [1, -5], "size": ["a", None]},
    {"counts": {}, "size": 3},
)
TOKENS = (
    b"",
    b"\x00",
    b"\xff\xfe",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"NaN",
    b"-",
    b"1e999",
)
TOKENS += (b"\n", b"\t", b"&a *a", b"!!python/object:os.system", b"---\n", b"? ", b"\xed\xa0\x80")
WORDS = (
    "",
    "nan",
    "inf",
    "-1",
    "1e400",
    "0x10",
    "½",
    "1_0",
    "99999999999999999999",
    "0.5 0.5",
    "#",
)


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, insert, overwrite, repeat or swap pieces."""
    for _ in range(rng.randint(1, 4)):
        kind, place = rng.randrange(6), rng.randrange(len(data) + 1)
        if kind == 0:
            data = data[:place]
        elif kind == 1:
            data = data[:place] + rng.choice(TOKENS) + data[place:]
        elif kind == 2:
            data = data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
        elif kind == 3:
            stop = min(len(data), place + rng.randint(1, 60))
            data = data[:place] + data[stop:]
        elif kind == 4:
            stop = min(len(data), place + rng.randint(1, 60))
            data = data[:stop] + data[place:stop] * rng.randint(1, 3) + data[stop:]
        else:
            data = rng.choice(TOKENS) * rng.choice((1, 3, 2000)) + data
    return data


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Change values, keys and lists somewhere in the tree."""
    document = json.loads(data)
    for _ in range(rng.randint(1, 3)):
        _mutate_tree(document, rng)
    if rng.random() < 0.05:
        document = rng.choice((*VALUES, [document], {"images": document}))
    return json.dumps(document, indent=rng.choice((None, 0, 2))).encode()


def _mutate_tree(node: Any, rng: random.Random) -> None:
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        kind = rng.randrange(4)
        if kind == 0:
            del node[key]
        elif kind == 1 and isinstance(node, list):
            node.insert(rng.randrange(len(node) + 1), rng.choice((child, *VALUES)))
        elif kind == 2 and isinstance(node, dict):
            node[rng.choice(("id", "bbox", "image_id", "names", "x"))] = node.pop(key)
        else:
            node[key] = rng.choice(VALUES)
        return


def mutate_labels(data: bytes, rng: random.Random) -> bytes:
    """Change words of label lines."""
    lines = [line.split(" ") for line in data.decode().splitlines()] or [[""]]
    for _ in range(rng.randint(1, 4)):
        words = rng.choice(lines)
        place = rng.randrange(len(words)) if words else 0
        kind = rng.randrange(3)
        if kind == 0 and words:
            words[place] = rng.choice(WORDS)
        elif kind == 1:
            words.insert(place, rng.choice(("0.5", *WORDS)))
        elif words:
            del words[place]
    return "\n".join(" ".join(words) for words in lines).encode()


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """Replace values and keys of data.yaml."""
    lines = data.decode().splitlines()
    values = (
        "[]",
        "{}",
        "5",
        "~",
        "[a, [b]]",
        "{0: a, 1: {b: c}}",
        "&x [*x]",
        "~nobody/x",
        "'\\0'",
    )
    values += ("../..", "/", "nan", "{a: 1, 0: b}", "[1, 2, 3]", "!!binary aa", "2001-01-01", "\\")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(lines))
        key, _, value = lines[place].partition(":")
        kind = rng.randrange(3)
        if kind == 0:
            lines[place] = f"{key}: {rng.choice(values)}"
        elif kind == 1:
            lines[place] = f"{rng.choice(('names', 'nc', 'path', 'val', '0', '*a'))}:{value}"
        else:
            lines.insert(place, f"path: {rng.choice(values)}")
    return "\n".join(lines).encode()
