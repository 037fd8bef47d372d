"""Numbers in words, as the page prints them."""

import math
from collections.abc import Sequence

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def perplexity(value: float) -> str:
    """Two decimals below 100, and never more than a few digits.

    >>> [perplexity(value) for value in (23.104, 310.27, 4815.3, 1.234e9, math.inf, math.nan)]
    ['23.10', '310.3', '4,815', '1.2 × 10⁹', '∞', 'not a number']
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if abs(value) >= 999_999.5:
        return scientific(value)
    for limit, decimals in ((99.995, 2), (999.95, 1)):
        if abs(value) < limit:
            return f"{value:.{decimals}f}"
    return f"{value:,.0f}"


def scientific(value: float) -> str:
    """
    >>> scientific(2e7), scientific(1.234e9), scientific(1e6)
    ('2 × 10⁷', '1.2 × 10⁹', '10⁶')
    """
    digits, exponent = f"{value:.1e}".split("e")
    power = f"10{str(int(exponent)).translate(_RAISED)}"
    return power if digits == "1.0" else f"{digits.removesuffix('.0')} × {power}"


def plain(value: float) -> str:
    """A number as short as it can be said to four digits; a small one as learning rates are written.

    >>> [plain(value) for value in (0, 2.5, 512, 20000, 0.0002, 3e7)]
    ['0', '2.5', '512', '20,000', '2e-4', '3 × 10⁷']
    """
    if value and abs(value) < 1e-3:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1e6:
        return scientific(value)
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:,.0f}"


def whole(value: float) -> str:
    """
    >>> whole(1234567)
    '1,234,567'
    """
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """A share from 0 to 1, to two digits where it is small.

    >>> [percent(share) for share in (1, 0.189, 0.0612, 0.00042, 0)]
    ['100%', '18.9%', '6.12%', '0.042%', '0%']
    """
    value = 100 * share
    if value >= 10 or value == 0:
        return f"{value:.1f}".removesuffix(".0") + "%"
    if value >= 0.01:
        return f"{float(f'{value:.3g}' if value >= 1 else f'{value:.2g}')}%"
    return "under 0.01%"


def change(share: float) -> str:
    """The size of a relative difference.

    >>> [change(share) for share in (-0.0512, 0.0004, 0.09999, 3.2)]
    ['5.1%', '0.04%', '10%', '320%']
    """
    value = abs(100 * share)
    return f"{value:.2f}%" if value < 0.0995 else f"{value:.1f}%" if value < 9.95 else f"{value:,.0f}%"


def duration(seconds: float) -> str:
    """
    >>> [duration(seconds) for seconds in (0.0123, 0.45, 9.5, 75, 4000)]
    ['12.3 ms', '450 ms', '9.5 s', '1 min 15 s', '1 h 7 min']
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"


def memory(count: float) -> str:
    """Bytes in the largest fitting binary unit.

    >>> [memory(count) for count in (512, 300 * 2**20, 1.5 * 2**30)]
    ['512 B', '300 MiB', '1.5 GiB']
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


def listed(parts: list[str]) -> str:
    """
    >>> listed(["LoRA", "norms", "embeddings"])
    'LoRA, norms and embeddings'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)


def joined(value: str | Sequence[str]) -> str:
    """The words of a list, or the word itself."""
    return value if isinstance(value, str) else ", ".join(value)


def spread(values: Sequence[int]) -> str:
    """
    >>> spread([512]), spread([1024, 700, 2048])
    ('512', '700 to 2,048')
    """
    least, most = min(values), max(values)
    return whole(least) if least == most else f"{whole(least)} to {whole(most)}"


def capital(words: str) -> str:
    """`words` with a capital at the beginning, and the rest as it is.

    >>> capital("stride: 256; score: LongPPL")
    'Stride: 256; score: LongPPL'
    """
    return words[:1].upper() + words[1:]
