"""Hub ids: the only place that uses the network, and only when one is given."""

from __future__ import annotations

import re
from pathlib import Path

from chinese_llama.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def is_hub_id(place: str | Path) -> bool:
    """True for "organisation/name", unless a directory "organisation" is here: then it is a path."""
    return HUB_ID.fullmatch(str(place)) is not None and not Path(place).parent.exists()


def local(place: str | Path) -> Path:
    """`place` as a directory: itself, or the snapshot of a hub id, downloaded if need be.

    Raises UserError where the hub does not have it or cannot be reached.
    """
    if not is_hub_id(place):
        return Path(place)
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(place)))
    except Exception as error:  # network and hub errors have no common base
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{place} is no directory here, and the hub does not give it ({what}).") from error
