{{- /* A pool: a Deployment, since any worker will do and a new one may come before an old one goes. A StatefulSet's names
and order would help nobody here, and keep a lost node's worker from being replaced. SIGTERM drains: no preStop hook is
needed, but time, which is the topology's worker.drain_seconds and some for the engine's end.
Called with (dict "root" $ "component" "prefill" "settings" .Values.prefill "replicas" 1 "topology" ...). */ -}}
{{- define "baton.pool" -}}
{{- $settings := .settings -}}
{{- $scheme := .topology.internalScheme -}}
{{- $ranks := index .topology (printf "%sRanks" .component) -}}
{{- $gpus := index ($settings.resources.limits | default dict) "nvidia.com/gpu" | default $ranks -}}
{{- if ne (int $gpus) (int $ranks) -}}
{{- fail (printf "%s.resources: nvidia.com/gpu is %v, and the topology's %s.tensor_parallel %v: a worker has one GPU for each rank" .component $gpus .component $ranks) -}}
{{- end -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "baton.metadata" . | nindent 2 }}
spec:
  {{- if eq .root.Values.autoscaling.kind "none" }}
  replicas: {{ .replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  progressDeadlineSeconds: {{ add $settings.startupSeconds 600 }}
  strategy:
    type: RollingUpdate
    {{- toYaml $settings.strategy | nindent 4 }}
  selector:
    matchLabels:
      {{- include "baton.componentSelector" . | nindent 6 }}
  template:
    metadata:
      {{- include "baton.podMetadata" . | nindent 6 }}
    spec:
      {{- include "baton.podPlacement" . | nindent 6 }}
      terminationGracePeriodSeconds: {{ add .topology.workerDrainSeconds 20 }}
      containers:
        - name: worker
          {{- include "baton.container" (dict "root" .root "component" .component "settings" $settings "module" (printf "%s_worker" .component)) | nindent 10 }}
          args:
            {{- include "baton.arguments" (dict "root" .root "topology" .topology "bootstrapHost" (include "baton.bootstrapHost" .root)) | nindent 12 }}
            - --name=$(POD_NAME)
            - --host=$(POD_IP)
            - --listen={{ .root.Values.listenAddress }}
            - --port={{ int $settings.port }}
          ports:
            - {name: http, containerPort: {{ int $settings.port }}, protocol: TCP}
          startupProbe:
            {{- include "baton.ask" (dict "path" "/ready" "scheme" $scheme) | nindent 12 }}
            periodSeconds: 2
            failureThreshold: {{ div $settings.startupSeconds 2 }}
          readinessProbe:
            {{- include "baton.ask" (dict "path" "/ready" "scheme" $scheme) | nindent 12 }}
            periodSeconds: 2
            failureThreshold: 1
          # A worker ends an engine process that hangs by itself: this is for a control process that hangs.
          livenessProbe:
            {{- include "baton.ask" (dict "path" "/live" "scheme" $scheme) | nindent 12 }}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
      volumes:
        {{- include "baton.volumes" . | nindent 8 }}
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
    - {name: http, port: {{ int $settings.port }}, targetPort: http, protocol: TCP}
{{- end -}}
