"""What of a base model decides whether a server can load adapters of it."""

from __future__ import annotations

from typing import Any

from autopeft.methods import LINEAR_ROLES
from autopeft.models.backbone import Backbone


def as_served(backbone: Backbone) -> dict[str, Any]:
    """Return the arguments of `Server.refused` for a base model and the head that is trained."""
    model: Any = backbone.model
    base = model.config.to_dict()
    places = backbone.layout.modules.items()
    return {
        # The class is what a merged model's configuration will name.
        "config": {**base, "architectures": [type(model).__name__]},
        "base": base,
        "modules": tuple(path for (_, role), at in places if role in LINEAR_ROLES for path in at),
    }
