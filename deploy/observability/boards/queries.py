"""Expressions that the dashboards have in common.

Every one is by namespace where several clusters may be, and says nothing of who is gone. `$namespace` may be anything,
also nothing: a cluster outside of Kubernetes has none.
"""

from __future__ import annotations

from deploy.observability.grafana import Query, Variable

HERE = 'namespace=~"$namespace"'
WORKER = f'{HERE},worker=~"$worker"'
NAMESPACE = Variable("namespace", "baton_workers", "namespace")
RATE = "[$__rate_interval]"


def percentiles(metric: str, where: str = HERE, by: str = "", ranks: tuple[int, ...] = (50, 95, 99)) -> list[Query]:
    """Of a histogram; `by` splits it further, by a label."""
    labels = f"{by}, le" if by else "le"
    legend = f"{{{{{by}}}}} " if by else ""
    return [
        Query(
            f"histogram_quantile({rank / 100:g}, sum by ({labels}) (rate({metric}_bucket{{{where}}}{RATE})))",
            f"{legend}p{rank}",
        )
        for rank in ranks
    ]


def rate(metric: str, by: str, where: str = HERE) -> Query:
    return Query(f"sum by ({by}) (rate({metric}{{{where}}}{RATE}))", f"{{{{{by}}}}}")


def total(metric: str, by: str, where: str = HERE) -> Query:
    return Query(f"sum by ({by}) ({metric}{{{where}}})", f"{{{{{by}}}}}")


def share_within(metric: str, bound: str, legend: str) -> Query:
    good = f'sum(rate({metric}_bucket{{{HERE},le="{bound}"}}{RATE}))'
    return Query(f"{good} / sum(rate({metric}_count{{{HERE}}}{RATE}))", legend)


TTFT = "baton_time_to_first_token_seconds"
GAP = "baton_inter_token_latency_seconds"
