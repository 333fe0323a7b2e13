{{- /* What all pods have in common. Called with (dict "root" $ "component" "prefill" "settings" .Values.prefill
"topology" what baton.topology says). */ -}}

{{- define "baton.podMetadata" -}}
labels:
  {{- include "baton.componentSelector" . | nindent 2 }}
  {{- with .root.Values.pods.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  baton/topology: {{ .topology.checksum }}
  {{- with .root.Values.pods.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{- /* Of the pod's spec: who it is, and where it may run. */ -}}
{{- define "baton.podPlacement" -}}
{{- $values := .root.Values -}}
serviceAccountName: {{ include "baton.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
# Else a worker would be process 1, on which SIGTERM has no effect until it has a handler: while Python imports.
shareProcessNamespace: true
securityContext:
  runAsNonRoot: true
  runAsUser: {{ int $values.pods.runAsUser }}
  runAsGroup: {{ int $values.pods.fsGroup }}
  fsGroup: {{ int $values.pods.fsGroup }}
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.pods.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- if .settings.hostNetwork }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
{{- with .settings.topologySpreadConstraints }}
  {{- toYaml . | nindent 2 }}
{{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "baton.componentSelector" . | nindent 8 }}
{{- end }}
{{- end -}}

{{- /* Of the one container: what it runs is "module", which is followed by the arguments of all processes. */ -}}
{{- define "baton.container" -}}
{{- $values := .root.Values -}}
image: {{ include "baton.image" .root | quote }}
imagePullPolicy: {{ $values.image.pullPolicy }}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- if .settings.ipcLock }}
    add: [IPC_LOCK]
    {{- end }}
resources:
  {{- toYaml .settings.resources | nindent 2 }}
env:
  - name: POD_NAME
    valueFrom: {fieldRef: {fieldPath: metadata.name}}
  - name: POD_IP
    valueFrom: {fieldRef: {fieldPath: status.podIP}}
  {{- with $values.pods.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with .settings.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
volumeMounts:
  - {name: topology, mountPath: /etc/baton/topology, readOnly: true}
  - {name: cluster-secret, mountPath: /etc/baton/secret, readOnly: true}
  - {name: scratch, mountPath: /tmp}
  {{- if and (eq .component "router") (not $values.secrets.apiKeys.open) }}
  - {name: api-keys, mountPath: /etc/baton/keys, readOnly: true}
  {{- end }}
  {{- if $values.secrets.tls.existingSecret }}
  - {name: tls, mountPath: /etc/baton/tls, readOnly: true}
  {{- end }}
  {{- if and $values.model.volume (ne .component "bootstrap") }}
  - {name: model, mountPath: {{ $values.model.mountPath }}, readOnly: true}
  {{- end }}
  {{- if .settings.sharedMemory }}
  - {name: shared-memory, mountPath: /dev/shm}
  {{- end }}
command: [python, -m, {{ .module }}]
{{- end -}}

{{- /* What a topology says for one machine, and a cluster of pods must have otherwise. Each pod sees its own cores. */ -}}
{{- define "baton.arguments" -}}
- --topology=/etc/baton/topology/topology.yaml
- --set=security.secret_file=/etc/baton/secret/{{ .root.Values.secrets.cluster.key }}
- --set=bootstrap.host={{ .bootstrapHost }}
- --set=bootstrap.port={{ .topology.bootstrapPort }}
- --set=prefill.cpus=[]
- --set=decode.cpus=[]
{{- end -}}

{{- define "baton.bootstrapHost" -}}
{{- .Values.bootstrap.host | default (printf "%s-bootstrap.%s.svc" (include "baton.fullname" .) .Release.Namespace) -}}
{{- end -}}

{{- define "baton.volumes" -}}
{{- $values := .root.Values -}}
- name: topology
  configMap: {name: {{ include "baton.fullname" .root }}-topology}
- name: cluster-secret
  secret: {secretName: {{ include "baton.clusterSecretName" .root }}, defaultMode: 288}
- name: scratch
  emptyDir: {sizeLimit: {{ .settings.scratch | default "256Mi" }}}
{{- if and (eq .component "router") (not $values.secrets.apiKeys.open) }}
- name: api-keys
  secret: {secretName: {{ include "baton.apiKeysName" .root }}, defaultMode: 288}
{{- end }}
{{- with $values.secrets.tls.existingSecret }}
- name: tls
  secret: {secretName: {{ . }}, defaultMode: 288}
{{- end }}
{{- if and $values.model.volume (ne .component "bootstrap") }}
- name: model
  {{- toYaml $values.model.volume | nindent 2 }}
{{- end }}
{{- if .settings.sharedMemory }}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .settings.sharedMemory }}}
{{- end }}
{{- end -}}

{{- /* An HTTP probe's question: (dict "path" "/ready" "scheme" "HTTP"). */ -}}
{{- define "baton.ask" -}}
httpGet: {path: {{ .path }}, port: http, scheme: {{ .scheme }}}
{{- end -}}
