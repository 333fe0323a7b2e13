{{- /* A pool: a Deployment, since any worker will do and a new one may come before an old one goes. A StatefulSet's names
and order would help nobody here, and keep a lost node's worker from being replaced. Where a worker's ranks are on several
nodes it is a group of pods, and the pool a LeaderWorkerSet (kubernetes-sigs/lws): its leaders are the workers, and each
further pod runs ranks for its leader. SIGTERM drains: no preStop hook is needed, but time, which is the topology's
worker.drain_seconds and some for the engine's end. Called with
(dict "root" $ "component" "prefill" "settings" .Values.prefill "replicas" 1 "topology" ...). */ -}}
{{- define "baton.pool" -}}
{{- $settings := .settings -}}
{{- $nodes := index .topology (printf "%sNodes" .component) | int -}}
{{- $ranks := div (index .topology (printf "%sRanks" .component)) $nodes -}}
{{- $gpus := index ($settings.resources.limits | default dict) "nvidia.com/gpu" | default $ranks -}}
{{- if ne (int $gpus) (int $ranks) -}}
{{- fail (printf "%s.resources: nvidia.com/gpu is %v, and a pod of the topology's %s wants %v, one for each rank" .component $gpus .component $ranks) -}}
{{- end -}}
{{- if gt $nodes 1 }}
{{- include "baton.spreadPool" . }}
{{- else }}
{{- include "baton.plainPool" . }}
{{- end }}
{{- end -}}

{{- define "baton.plainPool" -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  {{- if eq .root.Values.autoscaling.kind "none" }}
  replicas: {{ .replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  progressDeadlineSeconds: {{ add .settings.startupSeconds 600 }}
  strategy:
    type: RollingUpdate
    {{- toYaml .settings.strategy | nindent 4 }}
  selector:
    matchLabels:
      {{- include "baton.componentSelector" . | nindent 6 }}
  template:
    {{- include "baton.workerPod" . | nindent 4 }}
---
# Nobody needs this name to serve (workers tell bootstrap their addresses): it is for finding them, by DNS or in Prometheus.
apiVersion: v1
kind: Service
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- include "baton.componentSelector" . | nindent 4 }}
  ports:
    - {name: http, port: {{ int .settings.port }}, targetPort: http, protocol: TCP}
{{- end -}}

{{- /* Its Service, of the same name, its controller makes: pods of a group find their leader by it before they are ready. */ -}}
{{- define "baton.spreadPool" -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  {{- if eq .root.Values.autoscaling.kind "none" }}
  replicas: {{ .replicas }}
  {{- end }}
  # A leader is ready when its ranks are, on all of its pods: these must not wait for that.
  startupPolicy: LeaderCreated
  rolloutStrategy:
    type: RollingUpdate
    rollingUpdateConfiguration:
      {{- toYaml .settings.strategy.rollingUpdate | nindent 6 }}
  leaderWorkerTemplate:
    size: {{ index .topology (printf "%sNodes" .component) }}
    # What a pod has lost the others can't do without: they come back together.
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      {{- include "baton.workerPod" . | nindent 6 }}
    workerTemplate:
      {{- include "baton.workerPod" (dict "root" .root "component" (include "baton.rankHosts" .component) "pool" .component "settings" .settings "topology" .topology) | nindent 6 }}
{{- end -}}

{{- /* The component of a pool's further pods. */ -}}
{{- define "baton.rankHosts" -}}
{{ . }}-rank-host
{{- end -}}

{{- /* A worker's pod; with "pool", one of those that run ranks for a worker of that pool. */ -}}
{{- define "baton.workerPod" -}}
{{- $settings := .settings -}}
{{- $scheme := .topology.internalScheme -}}
metadata:
  {{- include "baton.podMetadata" . | nindent 2 }}
spec:
  {{- include "baton.podPlacement" . | nindent 2 }}
  terminationGracePeriodSeconds: {{ add .topology.workerDrainSeconds 20 }}
  containers:
    - name: worker
      {{- include "baton.container" (dict "root" .root "component" .component "settings" $settings "module" (printf "%s_worker" (.pool | default .component))) | nindent 6 }}
      args:
        {{- include "baton.arguments" (dict "root" .root "topology" .topology "bootstrapHost" (include "baton.bootstrapHost" .root)) | nindent 8 }}
        - --name=$(POD_NAME)
        - --host=$(POD_IP)
        - --listen={{ .root.Values.listenAddress }}
        - --port={{ int $settings.port }}
        {{- if .pool }}
        - --node=$(LWS_WORKER_INDEX)
        - --leader={{ $scheme | lower }}://$(LWS_LEADER_ADDRESS):{{ int $settings.port }}
        {{- end }}
      ports:
        - {name: http, containerPort: {{ int $settings.port }}, protocol: TCP}
      startupProbe:
        {{- include "baton.ask" (dict "path" "/ready" "scheme" $scheme) | nindent 8 }}
        periodSeconds: 2
        failureThreshold: {{ div $settings.startupSeconds 2 }}
      readinessProbe:
        {{- include "baton.ask" (dict "path" "/ready" "scheme" $scheme) | nindent 8 }}
        periodSeconds: 2
        failureThreshold: 1
      # A worker ends an engine process that hangs by itself: this is for a control process that hangs.
      livenessProbe:
        {{- include "baton.ask" (dict "path" "/live" "scheme" $scheme) | nindent 8 }}
        periodSeconds: 10
        timeoutSeconds: 5
        failureThreshold: 6
  volumes:
    {{- include "baton.volumes" . | nindent 4 }}
{{- end -}}

{{- /* The components of the processes that reach each other by any port, as a YAML list. Called with what baton.topology
says. */ -}}
{{- define "baton.members" -}}
- bootstrap
- prefill
- decode
{{- if gt (int .prefillNodes) 1 }}
- {{ include "baton.rankHosts" "prefill" }}
{{- end }}
{{- if gt (int .decodeNodes) 1 }}
- {{ include "baton.rankHosts" "decode" }}
{{- end }}
{{- end -}}

{{- /* What a pool's object is, for those that scale it: (dict "root" $ "component" "decode" "topology" ...). */ -}}
{{- define "baton.scaleTarget" -}}
{{- if gt (int (index .topology (printf "%sNodes" .component))) 1 -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "baton.fullname" .root }}-{{ .component }}
{{- end -}}
