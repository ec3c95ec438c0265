"""Writes respacing_table.json: the published respacing rule, worked out without adm_rt.

The rule adds a float64 stride to a float64 position and rounds half to even. Here every IEEE-754
operation is carried out on exact fractions and rounded explicitly to 53 bits, so the table depends
neither on the code under test nor on Python's float. Run: ``python make_respacing_table.py``.
"""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

STEPS = 1000
SHOWN = ["1", "2", "3", "10", "25", "27", "50", "100", "250", "ddim25", "ddim250", "90,60,60,20,20"]
SECTIONS = [
    "90,60,60,20,20",
    "10,10,15,20,200",
    "1,1",
    "1,2,3,4,5,6,7",
    "334,333,333",
    "5,9",
    "500,500",
    "25,25,25",
]


def half_even(value: Fraction) -> int:
    floor = value.numerator // value.denominator
    rest = value - floor
    if rest != Fraction(1, 2):
        return floor + (rest > Fraction(1, 2))
    return floor + floor % 2


def double(value: Fraction) -> Fraction:
    """The nearest float64, ties to even (no subnormals or overflow here)."""
    if value == 0:
        return value
    exponent = value.numerator.bit_length() - value.denominator.bit_length() - 53
    while value / Fraction(2) ** exponent >= 2**53:
        exponent += 1
    unit = Fraction(2) ** exponent
    return half_even(value / unit) * unit


def section(size: int, count: int) -> list[int]:
    if count == 1:
        return [0]
    stride = double(Fraction(size - 1, count - 1))
    position, kept = Fraction(0), []
    for _ in range(count):
        kept.append(half_even(position))
        position = double(position + stride)
    return kept


def spaced(text: str) -> list[int]:
    counts = [int(c) for c in text.split(",")]
    kept, start = set(), 0
    for index, count in enumerate(counts):
        size = STEPS // len(counts) + (index < STEPS % len(counts))
        assert count <= size
        kept |= {start + k for k in section(size, count)}
        start += size
    return sorted(kept)


def ddim(count: int) -> list[int] | None:
    for stride in range(1, STEPS):
        if -(-STEPS // stride) == count:  # ceil: multiples of the stride below STEPS
            return [stride * k for k in range(count)]
    return None


def digest(kept: list[int]) -> str:
    return hashlib.sha256(",".join(map(str, kept)).encode()).hexdigest()[:16]


def main():
    lists = {str(n): spaced(str(n)) for n in range(1, STEPS + 1)}
    lists |= {text: spaced(text) for text in SECTIONS}
    strided = {n: ddim(n) for n in range(1, STEPS + 1)}
    lists |= {f"ddim{n}": kept for n, kept in strided.items() if kept is not None}
    table = {
        "steps": STEPS,
        "digest": {text: digest(kept) for text, kept in lists.items()},
        "kept": {text: lists[text] for text in SHOWN},
    }
    path = Path(__file__).with_name("respacing_table.json")
    path.write_text(json.dumps(table, separators=(",", ":")).replace('","', '",\n"') + "\n")
    exact = sum(
        lists[str(n)] != [half_even(Fraction(999 * k, n - 1)) for k in range(n)]
        for n in range(2, STEPS + 1)
    )
    print(f"{len(lists)} strings; float64 sums differ from exact positions for {exact} values of N")


if __name__ == "__main__":
    main()
