"""Which of the cluster's node groups replicas go to."""

from typing import Any


def preferably_on(group: str) -> dict[str, Any]:
    """Return the actor options that place a replica on nodes of `group` (see infra/), or else wherever there is room.

    A cluster of one node, a laptop's, has no groups.
    """
    return {"label_selector": {"ray.io/node-group": group}, "fallback_strategy": [{"label_selector": {}}]}
