"""Reads the records of an offline W&B run with wandb's own messages; its log format is LevelDB's (32 KiB blocks)."""

import struct
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Record]:
    content = path.read_bytes()
    assert content[:4] == b":W&B"
    place, parts = FILE_HEADER, b""
    while place + RECORD_HEADER <= len(content):
        if BLOCK - place % BLOCK < RECORD_HEADER:  # too little room for a header: padding up to the next block
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + RECORD_HEADER])
        parts += content[place + RECORD_HEADER : place + RECORD_HEADER + length]
        place += RECORD_HEADER + length
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
