"""Topologies and values that between them take every turn of the templates."""

from __future__ import annotations

from tests.unit.deploy.kubernetes.rendering import MINIMAL, REPOSITORY, TOPOLOGIES

_CERTIFICATE = "{certificate: /etc/baton/tls/tls.crt, key: /etc/baton/tls/tls.key}"
_TLS = f"security: {{tls: {_CERTIFICATE}}}\nrouter: {{tls: {_CERTIFICATE}, drain_seconds: 2.5}}\nworker:\n"

TOPOLOGY_TEXTS = {path.stem: path.read_text() for path in TOPOLOGIES} | {
    "minimal": MINIMAL,
    "tls": MINIMAL + _TLS,
    "odd": """
model: {path: "/models/<m> & co", name: "ünlike\\"s"}
prefill: {replicas: 0}
kv: {max_quarantine_share: 0.25, max_quarantine_seconds: 1.0e+2}
""",
}
_EXAMPLES = {path.stem: path.read_text() for path in (REPOSITORY / "deploy/kubernetes/examples").glob("*.yaml")}
_SPREAD = _EXAMPLES.pop("multi-node")
SPREAD = [
    (TOPOLOGY_TEXTS["multi-node"], _SPREAD),
    (TOPOLOGY_TEXTS["multi-node"], f"{_SPREAD}autoscaling: {{kind: hpa}}"),
    (TOPOLOGY_TEXTS["multi-node"], f"{_SPREAD}autoscaling: {{kind: keda}}"),
    (MINIMAL + "decode: {tensor_parallel: 4, nodes: 2}\n", ""),
]
"""Workers on several nodes, and what their pods must be given."""
VALUES = dict(sorted(_EXAMPLES.items())) | {
    "none": "",
    "keda": "autoscaling: {kind: keda, decode: {committedPages: 0.75, maxReplicas: 20}}",
    "named": "fullnameOverride: llm\nnameOverride: lm\nserviceAccount: {create: false, name: someone}",
    "external": "autoscaling: {kind: external}\nprefill: {resources: {limits: {nvidia.com/gpu: 1}}}",
    "locked": """
secrets: {cluster: {existingSecret: s, key: one}, apiKeys: {existingSecret: k}, tls: {existingSecret: t}}
networkPolicy: {clients: [], monitoring: [{namespaceSelector: {matchLabels: {name: monitoring}}}]}
image: {digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", pullSecrets: [{name: r}]}
podMonitor: {enabled: true, labels: {release: kps}, tlsConfig: {insecureSkipVerify: true}}
""",
    "everything": """
pods: {labels: {team: ml}, annotations: {note: "yes"}, priorityClassName: high, extraEnv: [{name: UCX_TLS, value: tcp}]}
prefill:
  hostNetwork: true
  ipcLock: true
  runtimeClassName: nvidia
  sharedMemory: 0
  extraEnv: [{name: A, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}]
  topologySpreadConstraints: [{maxSkew: 1, topologyKey: rack, whenUnsatisfiable: DoNotSchedule}]
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [
    {matchExpressions: [{key: gpu, operator: Exists}]}]}}}
router: {service: {type: LoadBalancer, annotations: {a: b}}, tolerations: [{operator: Exists}]}
bootstrap: {host: bootstrap.example, nodeSelector: {a: b}}
model: {volume: {hostPath: {path: /srv/models, type: Directory}}}
serviceAccount: {annotations: {a: b}}
podDisruptionBudget: {maxUnavailable: 50%}
listenAddress: $(POD_IP)
""",
    "little": """
networkPolicy: {enabled: false}
podDisruptionBudget: {enabled: false}
secrets: {apiKeys: {open: true}}
""",
}
