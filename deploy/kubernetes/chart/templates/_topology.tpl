{{- /* What the objects need to know of the topology, with the defaults of cluster/config.py (tests compare them), and
"checksum": pods are replaced when it changes, so it leaves out what merely scales a pool. As YAML, since a template can
return nothing but text. */ -}}
{{- define "baton.topology" -}}
{{- $topology := .Values.topology | default dict -}}
{{- if kindIs "string" $topology -}}
{{- $topology = fromYaml $topology -}}
{{- end -}}
{{- if hasKey $topology "Error" -}}
{{- fail (printf "topology: not valid YAML: %s" $topology.Error) -}}
{{- end -}}
{{- if not $topology -}}
{{- fail "topology: missing; give one by --set-file topology=my-cluster.yaml" -}}
{{- end -}}
{{- $prefill := $topology.prefill | default dict -}}
{{- $decode := $topology.decode | default dict -}}
{{- $bootstrap := $topology.bootstrap | default dict -}}
{{- $router := $topology.router | default dict -}}
{{- $worker := $topology.worker | default dict -}}
{{- $security := $topology.security | default dict -}}
{{- range list $security $router -}}
{{- if and (hasKey . "open_probes") (not .open_probes) -}}
{{- fail "open_probes: false would keep the kubelet's probes out; networkPolicy keeps others out" -}}
{{- end -}}
{{- if eq ((.tls | default dict).client_certificates | default "none") "required" -}}
{{- fail "client_certificates: required would keep the kubelet's probes out, which have none" -}}
{{- end -}}
{{- end -}}
{{- $replicas := 1 -}}
{{- if hasKey $prefill "replicas" -}}
{{- $replicas = int $prefill.replicas -}}
{{- end -}}
{{- $others := omit $topology "prefill" "decode" | toJson -}}
{{- $pools := list (omit $prefill "replicas" "cpus") (omit $decode "replicas" "cpus") (eq $replicas 0) | toJson -}}
prefillReplicas: {{ $replicas }}
decodeReplicas: {{ $decode.replicas | default 1 | int }}
prefillRanks: {{ mul ($prefill.tensor_parallel | default 1) ($prefill.pipeline_parallel | default 1) }}
decodeRanks: {{ mul ($decode.tensor_parallel | default 1) ($decode.pipeline_parallel | default 1) }}
prefillNodes: {{ $prefill.nodes | default 1 | int }}
decodeNodes: {{ $decode.nodes | default 1 | int }}
bootstrapPort: {{ $bootstrap.port | default 8998 | int }}
routerPort: {{ $router.port | default 8000 | int }}
workerDrainSeconds: {{ $worker.drain_seconds | default 30 | ceil | int }}
routerDrainSeconds: {{ $router.drain_seconds | default 10 | ceil | int }}
internalScheme: {{ if ($security.tls | default dict).certificate }}HTTPS{{ else }}HTTP{{ end }}
routerScheme: {{ if ($router.tls | default dict).certificate }}HTTPS{{ else }}HTTP{{ end }}
checksum: {{ printf "%s%s" $others $pools | sha256sum }}
{{- end -}}
