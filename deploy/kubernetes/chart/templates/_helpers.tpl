{{- /* Names and labels. */ -}}

{{- define "baton.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := .Values.nameOverride | default .Chart.Name -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Of all objects of one installation. */ -}}
{{- define "baton.selector" -}}
app.kubernetes.io/name: {{ .Values.nameOverride | default .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- /* Of one component: (dict "root" $ "component" "prefill"). Selectors never change in an object's life. */ -}}
{{- define "baton.componentSelector" -}}
{{ include "baton.selector" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- /* The head of an object's metadata: (dict "root" $ "component" "prefill"), and "name" for another suffix. */ -}}
{{- define "baton.metadata" -}}
name: {{ include "baton.fullname" .root }}-{{ .name | default .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "baton.componentSelector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end -}}

{{- define "baton.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- .Values.serviceAccount.name | default (include "baton.fullname" .) -}}
{{- else -}}
{{- .Values.serviceAccount.name | default "default" -}}
{{- end -}}
{{- end -}}

{{- define "baton.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end -}}
{{- end -}}

{{- define "baton.clusterSecretName" -}}
{{- .Values.secrets.cluster.existingSecret | default (printf "%s-cluster" (include "baton.fullname" .)) -}}
{{- end -}}

{{- define "baton.apiKeysName" -}}
{{- .Values.secrets.apiKeys.existingSecret | default (printf "%s-api-keys" (include "baton.fullname" .)) -}}
{{- end -}}
