"""A cost: how long a phone takes to fetch the adapter."""

import autopeft

_BYTES_PER_SECOND = 250_000


def download_seconds(price: autopeft.Price, plan: autopeft.AdapterPlan) -> float:
    """Return the seconds; it is known before training, as every cost of a plug-in."""
    return price.adapter_bytes / _BYTES_PER_SECOND
