"""Finds values that are not finite, or would not be in the engine's dtype, without torch."""

import numpy as np

# Stored dtype → unsigned integers of its size.
_INTEGERS = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
# Engine's dtype → stored dtype → bits, without the sign, of the least value that becomes infinite.
_LEAST = {
    "float32": {"F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80},
    "bfloat16": {"F32": 0x7F7F8000, "F16": 0x7C00, "BF16": 0x7F80},
    "float16": {"F32": 0x477FF000, "F16": 0x7C00, "BF16": 0x4780},
}


def first_not_finite(data: memoryview, stored: str, kept: str) -> int | None:
    """The index of the first value of dtype `stored` that is not finite in `kept`."""
    # Shifting the sign out leaves the order of the magnitudes.
    magnitudes = np.frombuffer(data, _INTEGERS[stored]) << 1
    least = _LEAST[kept][stored] << 1
    if not len(magnitudes) or magnitudes.max() < least:
        return None
    return int(np.argmax(magnitudes >= least))
