"""What a platform engineer counts on, for every topology that we ship."""

import re
from math import ceil

import msgspec
import pytest

from cluster.access.security import ClusterSecurity, open_api_keys
from cluster.config import Model, Topology
from cluster.errors import ConfigError
from cluster.messages import Load, Role
from cluster.metrics import WorkerMetrics, render
from cluster.server_process import topology_parser, worker_parser
from cluster.topology import dump_topology, load_topology
from deploy.kubernetes.chart import CHART, Release
from tests.unit.deploy.kubernetes.rendering import MINIMAL, POOLS, REPOSITORY, TOPOLOGIES, Rendered, topology_of

AUTOSCALED = "autoscaling: {{kind: {}, prefill: {{ttftBudgetSeconds: 0.5, tokensPerSecond: 9001}}}}"


@pytest.fixture(params=TOPOLOGIES, ids=lambda path: path.stem)
def topology_file(request):
    return request.param


# --- what is started -------------------------------------------------------------------------------------------------


def test_each_process_understands_its_arguments_and_finds_the_others(topology_file, tmp_path):
    given = load_topology(topology_file)
    rendered = Rendered(topology_file.read_text())
    assert set(rendered.pods()) == {"bootstrap", "router", "decode"} | (set() if given.unified else {"prefill"})
    for component in rendered.pods():
        container = rendered.container(component)
        module = container["command"][-1]
        assert (REPOSITORY / module / "__main__.py").is_file()
        parser = (worker_parser if component in POOLS else topology_parser)(module, "")
        arguments = parser.parse_args(container["args"])
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert arguments.topology.rpartition("/")[0] in mounts
        read = topology_of(rendered, tmp_path, component)
        assert read.model == given.model and read.kv == given.kv and read.unified == given.unified
        if component in POOLS:
            assert (arguments.name, arguments.host, arguments.listen) == ("$(POD_NAME)", "$(POD_IP)", "0.0.0.0")
            assert arguments.port == container["ports"][0]["containerPort"]
        own = {"bootstrap": read.bootstrap, "router": read.router}.get(component)
        if own is not None:
            assert (own.host, own.port) == ("0.0.0.0", container["ports"][0]["containerPort"])
        if component != "bootstrap":
            service = rendered.all("Service")["bootstrap"]
            assert read.bootstrap.host == f"{service['metadata']['name']}.inference.svc"
            assert read.bootstrap.port == service["spec"]["ports"][0]["port"]


def test_pods_have_cores_of_their_own_whatever_the_topology_says_of_one_machine(topology_file, tmp_path):
    read = topology_of(Rendered(topology_file.read_text()), tmp_path, "decode")
    assert (read.prefill.cpus, read.decode.cpus) == ([], [])


def test_the_charts_defaults_are_the_topologys_own():
    """The templates know some of cluster/config.py: a topology that says nothing gives what one that says everything
    does, but for the mark of its text."""

    def unmarked(rendered: Rendered) -> list:
        objects = [one for one in rendered.objects if one["kind"] not in ("ConfigMap", "Secret")]
        for one in objects:
            one["spec"] = one.get("spec", {})
            one["spec"].get("template", {}).get("metadata", {}).pop("annotations", None)
        return objects

    full = dump_topology(Topology(model=Model(path="/models/m")))
    assert unmarked(Rendered(MINIMAL)) == unmarked(Rendered(full))


def test_a_topology_may_be_a_mapping_among_the_values(topology_file, tmp_path):
    text = topology_file.read_text()
    mapping = msgspec.yaml.decode(text)
    as_text, as_mapping = Rendered(text), Rendered(mapping)
    assert as_text.pods() == as_mapping.pods()
    assert topology_of(as_text, tmp_path, "router") == topology_of(as_mapping, tmp_path, "router")


# --- who may speak to whom -------------------------------------------------------------------------------------------


def test_processes_that_listen_for_others_have_the_secret_and_nobody_else_sees_it(tmp_path):
    rendered = Rendered()
    secrets = rendered.all("Secret")
    values = [value for secret in secrets.values() for value in secret["data"].values()]
    assert len(set(values)) == 2 and all(len(value) >= 32 for value in values)
    for kind in ("ConfigMap", "Deployment"):
        for made in rendered.all(kind).values():
            assert not any(value in str(made) for value in values)
    for component in rendered.pods():
        read = topology_of(rendered, tmp_path, component)
        files = {"/etc/baton/secret": "cluster-secret", "/etc/baton/keys": "api-keys"}
        for folder, name in files.items():
            (tmp_path / name).write_text("0123456789abcdef")
            file = {"cluster-secret": read.security.secret_file, "api-keys": read.router.api_keys_file}[name]
            mounted = folder in {mount["mountPath"] for mount in rendered.container(component)["volumeMounts"]}
            assert mounted == (name == "cluster-secret" or component == "router")
            assert (file == f"{folder}/{name}") == mounted
        security = msgspec.structs.replace(read.security, secret_file=str(tmp_path / "cluster-secret"))
        ClusterSecurity(security).require_for("0.0.0.0", "here")
        if component == "router":
            router = msgspec.structs.replace(read.router, api_keys_file=str(tmp_path / "api-keys"))
            assert open_api_keys(router, security) is not None


def test_existing_secrets_are_used_and_none_is_made():
    rendered = Rendered(
        values="secrets: {cluster: {existingSecret: mine, key: s}, apiKeys: {existingSecret: theirs, key: k}}"
    )
    assert rendered.all("Secret") == {}
    volumes = {volume["name"]: volume for volume in rendered.pods()["router"]["volumes"]}
    assert volumes["cluster-secret"]["secret"]["secretName"] == "mine"
    assert volumes["api-keys"]["secret"]["secretName"] == "theirs"
    assert rendered.settings("router")["security.secret_file"] == "/etc/baton/secret/s"
    assert rendered.settings("router")["router.api_keys_file"] == "/etc/baton/keys/k"


def test_a_router_without_keys_is_one_that_was_asked_to_be_open(tmp_path):
    rendered = Rendered(values="secrets: {apiKeys: {open: true}}")
    assert set(rendered.all("Secret")) == {"cluster"}
    read = topology_of(rendered, tmp_path, "router")
    assert open_api_keys(read.router, msgspec.structs.replace(read.security, secret_file=None)) is None
    assert not topology_of(rendered, tmp_path, "decode").security.allow_insecure


def test_only_members_reach_workers_and_only_clients_and_members_of_monitoring_the_router():
    ingress = "{namespaceSelector: {matchLabels: {name: ingress}}}"
    scrapers = "{namespaceSelector: {matchLabels: {name: monitoring}}}"
    rendered = Rendered(values=f"networkPolicy: {{clients: [{ingress}], monitoring: [{scrapers}]}}")
    policies = {name: made["spec"] for name, made in rendered.all("NetworkPolicy").items()}
    members, router = policies["members"], policies["router"]
    covered = {*members["podSelector"]["matchExpressions"][0]["values"], "router"}
    assert covered == set(rendered.pods())
    first, second = members["ingress"]
    assert set(first["from"][0]["podSelector"]["matchExpressions"][0]["values"]) == set(rendered.pods())
    assert "namespaceSelector" not in first["from"][0] and "ports" not in first
    assert second["from"] == [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]
    allowed = [rule["from"][0]["namespaceSelector"]["matchLabels"]["name"] for rule in router["ingress"]]
    assert allowed == ["ingress", "monitoring"]
    nobody = Rendered(values="networkPolicy: {clients: []}").all("NetworkPolicy")["router"]["spec"]
    assert nobody["policyTypes"] == ["Ingress"] and not nobody["ingress"]


def test_pods_pass_the_restricted_level_of_pod_security():
    for component, pod in Rendered().pods().items():
        container = pod["containers"][0]
        security, own = pod["securityContext"], container["securityContext"]
        assert security["runAsNonRoot"] and security["runAsUser"] > 0, component
        assert security["seccompProfile"]["type"] == "RuntimeDefault"
        assert own == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pod["automountServiceAccountToken"] and not pod.get("hostNetwork")
        assert all(set(volume) - {"name"} <= {"configMap", "secret", "emptyDir"} for volume in pod["volumes"])
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == ({"/tmp", "/dev/shm"} if component in POOLS else {"/tmp"})


# --- ends and beginnings ---------------------------------------------------------------------------------------------


def test_grace_periods_leave_time_to_drain():
    slow = MINIMAL + "worker: {drain_seconds: 90.5}\nrouter: {drain_seconds: 45}\n"
    for text, worker_seconds, router_seconds in ((MINIMAL, 30, 10), (slow, 90.5, 45)):
        rendered = Rendered(text)
        pods = rendered.pods()
        for pool in POOLS:
            assert pods[pool]["terminationGracePeriodSeconds"] == ceil(worker_seconds) + 20
        (_, waiting) = rendered.container("router")["lifecycle"]["preStop"]["exec"]["command"]
        assert pods["router"]["terminationGracePeriodSeconds"] == int(waiting) + router_seconds + 10


def test_probes_ask_what_the_processes_answer_and_a_start_may_take_as_long_as_a_model_does():
    rendered = Rendered(values="prefill: {startupSeconds: 3000}")
    for component in rendered.pods():
        container = rendered.container(component)
        assert container["livenessProbe"]["httpGet"]["path"] == "/live"
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        ports = {port["name"] for port in container["ports"]}
        assert container["livenessProbe"]["httpGet"]["port"] in ports
    startup = rendered.container("prefill")["startupProbe"]
    assert startup["httpGet"]["path"] == "/ready" and startup["periodSeconds"] * startup["failureThreshold"] == 3000


def test_probes_speak_tls_where_the_processes_do():
    certificate = "{certificate: /etc/baton/tls/tls.crt, key: /etc/baton/tls/tls.key}"
    rendered = Rendered(
        MINIMAL + f"security: {{tls: {certificate}}}\n", values="secrets: {tls: {existingSecret: certificates}}"
    )
    schemes = {name: rendered.container(name)["readinessProbe"]["httpGet"]["scheme"] for name in rendered.pods()}
    assert schemes == {"bootstrap": "HTTPS", "prefill": "HTTPS", "decode": "HTTPS", "router": "HTTP"}
    assert "/etc/baton/tls" in {mount["mountPath"] for mount in rendered.container("decode")["volumeMounts"]}


@pytest.mark.parametrize(
    ("topology", "complaint"),
    [
        ("security: {open_probes: false}", "would keep the kubelet's probes out"),
        ("router: {tls: {client_certificates: required}}", "would keep the kubelet's probes out"),
        ("model: {path: [", "_topology.tpl:.*not valid YAML"),
        ("", "topology: missing"),
    ],
)
def test_what_could_not_run_is_refused(topology, complaint):
    with pytest.raises(ConfigError, match=complaint):
        Rendered(topology)


# --- scaling ---------------------------------------------------------------------------------------------------------


def deployments(topology: str, values: str = "") -> dict:
    return Rendered(topology, values).all("Deployment")


def test_each_pool_scales_alone():
    one, more = "decode: {replicas: 1}\n", "decode: {replicas: 4, cpus: [[0], [0], [1], [1]]}\n"
    before, after = deployments(MINIMAL + one), deployments(MINIMAL + more)
    assert (before["decode"]["spec"].pop("replicas"), after["decode"]["spec"].pop("replicas")) == (1, 4)
    assert before == after, "and no pod is replaced"


def test_pods_are_replaced_when_what_they_read_has_changed():
    before = deployments(MINIMAL)
    for change in ("kv: {page_size: 32}", "decode: {max_running: 8}", "prefill: {chunk_tokens: 64}"):
        after = deployments(MINIMAL + change)
        assert all(before[name]["spec"]["template"] != after[name]["spec"]["template"] for name in before)


def test_a_worker_gets_a_gpu_for_each_of_its_ranks():
    gpus = "decode: {resources: {limits: {nvidia.com/gpu: 2}}}"
    assert deployments(MINIMAL + "decode: {tensor_parallel: 2}", gpus)
    assert deployments(MINIMAL + "decode: {pipeline_parallel: 2}", gpus)
    with pytest.raises(
        ConfigError, match=r"decode.resources: nvidia.com/gpu is 2, and .* decode wants 1, one for each rank"
    ):
        deployments(MINIMAL, gpus)


def test_selectors_find_the_pods_of_their_component_and_no_others():
    rendered = Rendered()
    labels = {name: made["spec"]["template"]["metadata"]["labels"] for name, made in rendered.all("Deployment").items()}
    for kind in ("Service", "PodDisruptionBudget"):
        for name, made in rendered.all(kind).items():
            selector = made["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            assert [found for found in labels if selector.items() <= labels[found].items()] == [name]
    other = Rendered(release=Release("baton-2", "inference"))
    for made in other.all("Deployment").values():
        assert not made["spec"]["selector"]["matchLabels"].items() <= labels["decode"].items()


def scrape() -> set[str]:
    """The names of a worker's metrics."""
    metrics = WorkerMetrics("w", Role.DECODE)
    metrics.observe_load(Load(pages_total=1))
    return set(re.findall(r"^([a-z_]+)\{", render(metrics.registry).decode(), re.MULTILINE))


def test_an_hpa_scales_a_pool_by_metrics_that_are_there():
    rendered = Rendered(values=AUTOSCALED.format("hpa"))
    scalers = rendered.all("HorizontalPodAutoscaler")
    signals = {
        name: {
            metric["pods"]["metric"]["name"]: metric["pods"]["target"]["averageValue"]
            for metric in made["spec"]["metrics"]
        }
        for name, made in scalers.items()
    }
    assert signals == {"prefill": {"baton_waiting_tokens": "4501"}, "decode": {"baton_kv_committed_ratio": "0.8"}}
    known = scrape()
    adapter = msgspec.yaml.decode((CHART.parent / "prometheus-adapter.yaml").read_text())
    served = {rule["seriesQuery"].partition("{")[0] for rule in adapter["rules"]["custom"]}
    for name, made in scalers.items():
        assert made["spec"]["scaleTargetRef"]["name"] == rendered.all("Deployment")[name]["metadata"]["name"]
        assert signals[name].keys() <= known and signals[name].keys() <= served
        assert "replicas" not in rendered.all("Deployment")[name]["spec"], "two would set it in turn"


def test_keda_asks_prometheus_for_the_same():
    rendered = Rendered(values=AUTOSCALED.format("keda"))
    assert rendered.all("HorizontalPodAutoscaler") == {}
    triggers = {name: made["spec"]["triggers"] for name, made in rendered.all("ScaledObject").items()}
    ((prefill,), (decode,)) = triggers["prefill"], triggers["decode"]
    assert prefill["metadata"]["threshold"] == "4501" and decode["metadata"]["threshold"] == "0.8"
    assert 'namespace="inference",pod=~"baton-prefill-.+"' in prefill["metadata"]["query"]
    for trigger in (prefill, decode):
        assert set(re.findall(r"baton_\w+", trigger["metadata"]["query"])) <= scrape()


def test_a_unified_pool_is_scaled_by_both_signals():
    rendered = Rendered(MINIMAL + "prefill: {replicas: 0}\n", AUTOSCALED.format("hpa"))
    (scaler,) = rendered.all("HorizontalPodAutoscaler").values()
    names = [metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]]
    assert names == ["baton_waiting_tokens", "baton_kv_committed_ratio"]


def test_a_pool_that_others_scale_has_no_size():
    rendered = Rendered(values="autoscaling: {kind: external}")
    assert all("replicas" not in rendered.all("Deployment")[pool]["spec"] for pool in POOLS)
    assert not rendered.all("HorizontalPodAutoscaler") and not rendered.all("ScaledObject")


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match=r"autoscaling.decode: minReplicas is more than maxReplicas"):
        Rendered(values="autoscaling: {kind: keda, decode: {minReplicas: 9}}")
