"""Placement of replicas on the cluster's node groups."""

from typing import Any


def preferably_on(group: str) -> dict[str, Any]:
    """Return actor options that place a replica on nodes of `group` (see infra/), or on any node if that is impossible.

    A cluster of one node has no groups.
    """
    return {"label_selector": {"ray.io/node-group": group}, "fallback_strategy": [{"label_selector": {}}]}
