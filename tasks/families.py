"""Task families: the small integers that routers see.

Append only. 0 is padding (seqio's packer strips zeros, so a family is never 0), and `MAX_FAMILIES` fixes the
shapes of every task table, so that a checkpoint still loads after a family has been added.
"""

MAX_FAMILIES = 64

FAMILIES = {
    "asr": 1,  # post-ASR from an n-best list
    "ocr": 2,  # post-OCR from one or more readings
    "mt": 3,  # post-MT from one or more translations
    "gec": 4,  # grammar and spelling
    "denoise": 5,  # synthetic noise on clean text, for base models
    "tn": 6,  # text normalisation: written -> spoken
    "itn": 7,  # inverse: spoken -> written
    "st": 8,  # speech translation
}


def family_id(name: str) -> int:
    """The id of a family. Raises KeyError with the known names."""
    if name not in FAMILIES:
        raise KeyError(f"unknown task family {name!r}; known: {', '.join(FAMILIES)} (add it to tasks/families.py)")
    return FAMILIES[name]
