"""Numbers of bytes as people write them: '2GiB', '1.5 GB'."""

import re

UNITS = {"": 1, "B": 1} | {f"{name}B": 1000**power for power, name in enumerate("KMGT", 1)}
UNITS |= {f"{name}iB": 1024**power for power, name in enumerate("KMGT", 1)}


def parse_bytes(text: str | int) -> int:
    """Converts '2GiB', '512 MiB', '1.5GB' or a plain number to bytes.

    Raises:
        ValueError: If the text has another form, or the size is not above 0.
    """
    found = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2] not in UNITS:
        raise ValueError(f"'{text}' is not a number of bytes; write it like 2GiB, 512MiB or 1500000000")
    if (size := int(float(found[1]) * UNITS[found[2]])) <= 0:
        raise ValueError(f"'{text}' is 0 bytes; give a budget above 0")
    return size


def show_bytes(size: float) -> str:
    """Formats a number of bytes for messages: '2.0 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
