"""What autoscalers ask Prometheus, answered by Prometheus' own engine."""

import json
import shutil
import subprocess

import pytest
import yaml

from deploy.kubernetes.chart import CHART
from tests.unit.deploy.kubernetes.rendering import Rendered

PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not here: it comes with Debian's package prometheus"
)


def series(metric: str, pod: str, value: float, namespace: str = "inference") -> dict:
    return {"series": f'{metric}{{namespace="{namespace}",pod="{pod}",worker="{pod}"}}', "values": f"{value}x9"}


DECODE = ("baton-decode-6f-a", "baton-decode-6f-b")
SERIES = [
    series("baton_kv_committed_ratio", DECODE[0], 0.5),
    series("baton_kv_committed_ratio", DECODE[1], 0.75),
    series("baton_kv_committed_ratio", "baton-prefill-9c-x", 1.0),
    series("baton_kv_committed_ratio", DECODE[0], 1.0, namespace="another"),
    series("baton_waiting_tokens", "baton-prefill-9c-x", 700),
    series("baton_waiting_tokens", "other-baton-prefill-9c-x", 9000),
]


def answers(query: str, expected: list[dict], folder) -> None:
    """Asserts what Prometheus says to a query of `SERIES`."""
    (folder / "rules.yaml").write_text("groups: []\n")
    test = {"expr": query, "eval_time": "2m", "exp_samples": expected}
    case = {"interval": "15s", "input_series": SERIES, "promql_expr_test": [test]}
    (folder / "tests.yaml").write_text(json.dumps({"rule_files": ["rules.yaml"], "tests": [case]}))
    done = subprocess.run(
        [PROMTOOL, "test", "rules", folder / "tests.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_keda_gets_the_sum_over_the_pool_and_nobody_elses(tmp_path):
    scaled = Rendered(values="autoscaling: {kind: keda}").all("ScaledObject")
    for pool, value in (("decode", 1.25), ("prefill", 700)):
        (trigger,) = scaled[pool]["spec"]["triggers"]
        answers(trigger["metadata"]["query"], [{"labels": "{}", "value": value}], tmp_path)


def test_the_adapter_gets_a_value_for_each_pod(tmp_path):
    rules = yaml.safe_load((CHART.parent / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    (rule,) = [rule for rule in rules if rule["seriesQuery"].startswith("baton_kv_committed_ratio")]
    matchers = f'namespace="inference",pod=~"{"|".join(DECODE)}"'
    query = rule["metricsQuery"].replace("<<.Series>>", "baton_kv_committed_ratio")
    query = query.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", "pod")
    expected = [{"labels": f'{{pod="{pod}"}}', "value": value} for pod, value in zip(DECODE, (0.5, 0.75), strict=True)]
    answers(query, expected, tmp_path)
