"""Our dashboards, one file each."""

from deploy.observability.boards.handoff import HANDOFF
from deploy.observability.boards.overview import OVERVIEW
from deploy.observability.boards.pools import POOLS
from deploy.observability.boards.router import ROUTER
from deploy.observability.boards.worker import ONE_WORKER

DASHBOARDS = (OVERVIEW, POOLS, HANDOFF, ROUTER, ONE_WORKER)
