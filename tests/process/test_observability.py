"""What dashboards, alerts and autoscalers ask for is there: in a live cluster, after a request and a recovery.

Once in the words of each process's own /metrics, and once through a real Prometheus that finds the cluster by the
configuration that we ship.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time
from pathlib import Path
from urllib.parse import urlencode

import aiohttp
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from bench.cluster import free_ports, get
from deploy.kubernetes.chart import Chart, Release
from deploy.observability.boards import DASHBOARDS
from tests.process.api import MODEL, Api, eventually
from tests.promql import asked

DEPLOY = Path(__file__).parents[2] / "deploy"
OBSERVABILITY = DEPLOY / "observability"
PROMETHEUS = shutil.which("prometheus")
OF_THE_TARGET = {"job", "instance", "namespace", "pod"}
"""Labels that Prometheus adds, as its configuration says."""
RARE = {
    "baton_unauthorized_requests_total": "only where there is a secret, and a stranger",
    "baton_breaker_trips_total": "only after several failures of one worker",
    "baton_stale_messages_total": "only when a worker's words cross a cancel",
}
"""Has no series yet in a cluster that is well: its name is there, its labels are not."""
STEP_SECONDS = 0.1

pytestmark = pytest.mark.timeout(400)


def rules():
    for path in sorted((OBSERVABILITY / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            yield from group["rules"]


RECORDED = {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def of_dashboards():
    for dashboard in DASHBOARDS:
        yield from dashboard.expressions


def of_autoscalers():
    adapter = yaml.safe_load((DEPLOY / "kubernetes" / "prometheus-adapter.yaml").read_text())
    yield from (rule["seriesQuery"] for rule in adapter["rules"]["custom"])
    topology = (DEPLOY / "topologies" / "demo.yaml").read_text()
    for kind in ("hpa", "keda"):
        values = f"autoscaling: {{kind: {kind}}}"
        for made in Chart().render(topology, values, "a test", Release("baton", "default")):
            if made["kind"] == "HorizontalPodAutoscaler":
                yield from (metric["pods"]["metric"]["name"] for metric in made["spec"]["metrics"])
            elif made["kind"] == "ScaledObject":
                yield from (trigger["metadata"]["query"] for trigger in made["spec"]["triggers"])


ASKING = {
    "dashboards": lambda: [*of_dashboards(), *(one.series for board in DASHBOARDS for one in board.variables)],
    "rules": lambda: [rule["expr"] for rule in rules()],
    "autoscalers": lambda: [*of_autoscalers()],
}


@pytest.fixture(scope="module")
def experienced(demo_cluster, reference):
    """The cluster of all tests; it has answered, refused, and recovered from the death of an engine process."""

    async def live_through() -> None:
        async with aiohttp.ClientSession() as session:
            api = Api(session, demo_cluster.url)
            await recover(demo_cluster, api, reference.named("raw-100").prompt)
            body = {"model": f"not {MODEL}", "prompt": "x"}
            async with session.post(f"{demo_cluster.url}/v1/completions", json=body) as refused:
                assert refused.status == 404

    asyncio.run(live_through())
    return demo_cluster


async def recover(cluster, api, prompt):
    """Kills the decode worker's engine process while it has a request, which goes on in the next one."""
    tokens = []
    async with api.open_stream(prompt, max_tokens=40, temperature=0, ignore_eos=True) as chunks:
        async for chunk in chunks:
            tokens += [token for choice in chunk["choices"] for token in choice["token_ids"]]
            if len(tokens) == 5:
                (engine,) = psutil.Process(cluster.tree.pids()["decode-0"]).children()
                engine.kill()
    assert len(tokens) == 40

    async def complete():
        return len(cluster.workers()) == 2 and all(status.load.ready for status in cluster.workers())

    await eventually(complete, "both workers are ready", seconds=90)
    cluster.wait_idle()


@pytest.fixture(scope="module")
def scraped(experienced):
    """Labels by name of series, over all processes."""
    workers = [status.member.url for status in experienced.workers()]
    labels: dict[str, set[str]] = {"up": OF_THE_TARGET}
    for url in (experienced.url, experienced.bootstrap_url, *workers):
        for family in text_string_to_metric_families(get(f"{url}/metrics").decode()):
            labels.setdefault(family.name + "_total" * (family.type == "counter"), set())
            for sample in family.samples:
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def labels_of(metric, scraped):
    """Of a recorded one, as far as its rule keeps them."""
    if metric not in RECORDED:
        return scraped.get(metric, set())
    question = asked(RECORDED[metric])
    return question.groups or set().union(*(labels_of(one, scraped) for one, _ in question.selectors))


def missing(expression, scraped):
    """What of the expression nobody has."""
    question = asked(expression)
    metrics = [metric for metric, _ in question.selectors]
    yield from (metric for metric in metrics if metric not in scraped and metric not in RECORDED)
    if RARE.keys() & set(metrics):
        return
    for metric, labels in question.selectors:
        yield from (f"{metric}: {label}" for label in labels - labels_of(metric, scraped) - OF_THE_TARGET)
    everybody = set().union(*(labels_of(metric, scraped) for metric in metrics))
    yield from (f"any of {metrics}: {label}" for label in question.groups - everybody - OF_THE_TARGET)


@pytest.mark.parametrize("who", ASKING)
def test_each_metric_and_label_that_is_asked_for_is_scraped(who, scraped):
    expressions = ASKING[who]()
    assert expressions
    assert {one: found for one in expressions if (found := [*missing(one, scraped)])} == {}


def test_a_recovery_shows_where_operators_look(experienced):
    """Once, at the router, with the error and the leg that is to blame; the stale series of the dead life are gone."""
    counted = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for url in (experienced.url, experienced.bootstrap_url)
        for family in text_string_to_metric_families(get(f"{url}/metrics").decode())
        for sample in family.samples
    }
    assert counted["baton_request_resumptions_total", ("reason", "worker_lost")] == 1
    assert counted["baton_attempt_failures_total", ("error", "WorkerLost"), ("role", "decode")] == 1
    assert counted["baton_member_leaves_total", ("reason", "goodbye")] >= 1
    assert counted["baton_worker_shut_out", ("role", "decode"), ("worker", "decode-0")] == 0
    assert counted["baton_worker_attempts", ("role", "decode"), ("worker", "decode-0")] == 0


# --- a real Prometheus -----------------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(experienced, tmp_path):
    """Its URL; it has the shipped configuration, but for addresses and pace."""
    text = (OBSERVABILITY / "prometheus.yaml").read_text()
    for shipped, real in (("127.0.0.1:8000", experienced.url), ("127.0.0.1:8998", experienced.bootstrap_url)):
        assert shipped in text
        text = text.replace(shipped, real.removeprefix("http://"))
    config = yaml.safe_load(text)
    config["rule_files"] = [str(OBSERVABILITY / file) for file in config["rule_files"]]
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "1s"}
    (tmp_path / "prometheus.yaml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = [
        PROMETHEUS, f"--config.file={tmp_path}/prometheus.yaml", f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(prometheus, expression):
    """The result's series. Raises OSError while it does not answer, and for what is no PromQL."""
    query = urlencode({"query": expression.replace("$__rate_interval", "1m").replace("$namespace", ".*")})
    return json.loads(get(f"{prometheus}/api/v1/query?{query}"))["data"]["result"]


@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not here: it is Debian's package of that name")
def test_prometheus_finds_the_cluster_and_every_panel_has_something_to_show(prometheus, experienced):
    def ready():
        try:
            scraped_twice = ask(prometheus, 'count_over_time(up{job=~"baton-.*"}[1m]) > 2')
            return len(scraped_twice) == 4 and ask(prometheus, "rate(baton_engine_steps[1m])")
        except OSError:
            return False

    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline, "Prometheus has not scraped all four processes"
        time.sleep(STEP_SECONDS)
    found = {series["metric"]["instance"] for series in ask(prometheus, 'up{job="baton-worker"} == 1')}
    assert found == {"prefill-0", "decode-0"}, "a worker goes by its name"
    unanswered = [
        expression
        for expression in {one.replace("$worker", ".+") for one in of_dashboards()}
        if not RARE.keys() & {metric for metric, _ in asked(expression).selectors} and not ask(prometheus, expression)
    ]
    assert unanswered == []
    for rule in rules():
        ask(prometheus, rule["expr"])
