"""`python -m deploy.observability`: writes the dashboards as Grafana imports them."""

from __future__ import annotations

from pathlib import Path

from deploy.observability.boards import DASHBOARDS
from deploy.observability.grafana import render

FOLDER = Path(__file__).parent / "dashboards"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for dashboard in DASHBOARDS:
        path = FOLDER / f"{dashboard.uid}.json"
        path.write_bytes(render(dashboard))
        print(path)


if __name__ == "__main__":
    main()
